"""Which checkpoints an RL phase leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dppo_mcore.config import OutputConfig, ParallelConfig
from dppo_mcore.learn import checkpoint
from dppo_mcore.learn.state import build
from dppo_mcore.metaloop import position
from dppo_mcore.metaloop.exchange import Exchange
from tests.learn.exact import config


@pytest.mark.usefixtures("single_rank")
def test_the_best_evaluation_inside_a_phase_is_kept(tiny_dir: str, tmp_path: Path) -> None:
    """Every third step is due; an evaluation better than any before is saved at once, and outlives newer ones."""
    options = replace(config(tiny_dir, ParallelConfig()), output=OutputConfig(save_interval=3))
    saver = checkpoint.Saver(tmp_path, keep=1)
    parts = SimpleNamespace(config=options, learner=build(options), saver=saver, exchange=Exchange.join(), step=0)
    run = cast(Any, parts)
    results = [{"all": {"success": score}, "objective": {}} if score else None for score in (0.2, 0.5, 0.4, 0.5, 0, 0)]
    saved = []
    for step, table in enumerate(results, 1):
        run.step = step
        score = position.score_of(run, {"eval": table}) if table else None
        position.save_if_due(run, "1-1 RL", step, score)
        saver.finish()
        saved.append(checkpoint.latest(tmp_path).name == f"step-{step:08d}")
    assert saved == [True, True, True, False, False, True]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000006"]
    assert checkpoint.read_meta(checkpoint.best(tmp_path))["score"] == 0.5
