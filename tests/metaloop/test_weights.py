"""Whose memory it is: trainer and engine take turns where they share it, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dppo_mcore.config import Config, OptimizerConfig, RolloutConfig
from dppo_mcore.metaloop.weights import rest


@pytest.mark.parametrize(
    ("offload", "rollout", "sleeps"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"rollout_placement": "disjoint"}, False),
        (True, {"rollout_url": "http://127.0.0.1:30000"}, False),
    ],
)
def test_the_engine_rests_before_its_first_answers(offload: bool, rollout: dict[str, Any], sleeps: bool) -> None:
    """A checkpoint is loaded then, and SFT may come first. A server given by URL is nobody's to put to sleep: a
    trainer that is killed could not wake it again."""
    slept: list[bool] = []
    config = Config(optimizer=OptimizerConfig(offload=offload), rollout=RolloutConfig(**rollout))
    rest(cast(Any, SimpleNamespace(config=config, engine=SimpleNamespace(sleep=lambda: slept.append(True)))))
    assert bool(slept) == sleeps
