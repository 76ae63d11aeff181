"""Curves and costs of a run that was killed and went on: each step once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dppo_mcore.practice.ledger import Ledger, PhasePlan
from dppo_mcore.report.curves import curves
from dppo_mcore.report.read import open_run


def curves_of(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.plan([PhasePlan("1-1 RL", 1, "rl")])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = open_run(folder)
    try:
        return curves(run)
    finally:
        run.close()


def step(number: int, reward: float, generate: float = 2.0, **more: Any) -> dict[str, Any]:
    costs = {"time/step": 3.0, "time/generate": generate, "time/train": 1.0, "time/logprobs": 0.25, "train/flops": 3e12}
    return {"step": number, "time": 100.0 + number, "phase": "1-1 RL", "phase_step": number, "rl/reward": reward,
            "rollout/flops": 2e12 * generate / 2, **costs, **more}  # fmt: skip


def test_a_step_done_again_stands_once_with_its_newest_figures(tmp_path: Path) -> None:
    """Steps 1 to 30, then from a checkpoint of step 10 to 22: generated for once, learnt from twice."""
    before = [step(k, 0.1) for k in range(1, 31)]
    again = [step(k, 0.2, generate=0.0) for k in range(11, 23)]
    found = curves_of(tmp_path, before + again)
    rewards = found["series"]["rl/reward"]
    assert [at for at, _ in rewards] == list(range(1, 31))
    assert [value for at, value in rewards if 11 <= at <= 22] == [0.2] * 12
    assert found["spans"] == {"1-1 RL": [1, 30]}
    seconds = found["seconds"]["1-1 RL"]
    assert (seconds["generate"], seconds["train"], seconds["logprobs"]) == pytest.approx((60.0, 22.5, 7.5))
    assert found["flops"]["1-1 RL"] == pytest.approx({"generation": 60e12, "training": 90e12})


def test_rows_of_different_kinds_at_one_step_all_count(tmp_path: Path) -> None:
    """Syncs and moves of the optimizer's state stand beside a step's own row, some of them several times."""
    moves: list[dict[str, Any]] = [{"step": 1, "time/offload/params": 0.5}, {"step": 1, "time/sync": 0.25}]
    rows = [step(1, 0.1), {"step": 1, "eval/success": 0.5, "phase": "1-1 RL"}, *moves, *moves, step(2, 0.1)]
    resumed = [*moves, step(2, 0.3)]
    found = curves_of(tmp_path, rows + resumed)
    assert found["seconds"]["1-1 RL"]["generate"] == 4.0
    assert found["seconds"][""] == {"offload/params": 1.0, "sync": 0.5}
    assert found["series"]["eval/success"] == [(1, 0.5)] and found["series"]["rl/reward"] == [(1, 0.1), (2, 0.3)]


def test_chunks_of_a_phase_without_steps_add_up(tmp_path: Path) -> None:
    rows = [{"step": 0, "phase": "1-1 buffer", "phase_step": k, "time/generate": 2.0} for k in range(5)]
    assert curves_of(tmp_path, rows)["seconds"] == {"1-1 buffer": {"generate": 10.0}}


def test_a_figure_that_is_none_the_second_time_is_none(tmp_path: Path) -> None:
    found = curves_of(tmp_path, [step(1, 0.1), step(2, 0.1), step(1, 0.1) | {"rl/reward": None}])
    assert found["series"]["rl/reward"] == [(2, 0.1)]


def test_a_curve_goes_forward_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    """A run that goes on with shorter intervals evaluates where it didn't before."""
    evaluated = [{"step": k, "phase": "1-1 RL", "eval/success": k / 10} for k in (4, 2, 3)]
    found = curves_of(tmp_path, [step(4, 0.1), evaluated[0], step(2, 0.1), *evaluated[1:]])
    assert found["series"]["eval/success"] == [(2, 0.2), (3, 0.3), (4, 0.4)]
