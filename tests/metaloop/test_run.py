"""Which prompt a run gives its samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dppo_mcore.metaloop.run import POOLS, Run
from dppo_mcore.practice.prompts import PromptTemplate
from dppo_mcore.types import Sample, Turn


@pytest.mark.parametrize("pool", POOLS)
def test_general_data_is_learnt_and_evaluated_under_one_prompt(pool: str) -> None:
    """Raw answers of general data are never under the prompt that asks for the format; practice always is."""
    raw = Sample("raw", "exact", (Turn("user", "2 + 2?"),), answer="four", gold="four")
    told = Sample("told", "exact", (Turn("user", "2 + 2?"),), answer="<think>add</think><answer>4</answer>", gold="4")
    run: Any = SimpleNamespace(template=PromptTemplate(), pools={pool: {"raw": raw, "told": told}})
    roles = {name: [turn.role for turn in Run.sample(run, pool, name).turns] for name in ("raw", "told")}
    general = pool in ("general", "eval-general")
    assert roles == {"raw": ["user"] if general else ["system", "user"], "told": ["system", "user"]}
