"""What the report says about a run as a whole: phases that aren't done, and what ends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dppo_mcore.practice.ledger import Ledger, PhasePlan, TeacherAnswer
from dppo_mcore.report.overview import overview
from dppo_mcore.report.read import open_run
from dppo_mcore.types import Rollout, Sample, ScoredRollout, Turn

STARTED = 1000.0


def overview_of(folder: Path) -> dict[str, Any]:
    run = open_run(folder)
    try:
        return overview(run)
    finally:
        run.close()


def killed_run(folder: Path) -> Ledger:
    """A buffer that took 100 s, and an RL phase that was killed; the ledger is open for what that one wrote."""
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.add_samples([Sample("a", "exact", (Turn("user", "?"),))], "rl")
    ledger.plan([PhasePlan("1-1 buffer", 1, "buffer"), PhasePlan("1-1 RL", 1, "rl"), PhasePlan("1-2 SFT", 1, "sft")])
    ledger.start_phase("1-1 buffer", 0)
    ledger.finish_phase("1-1 buffer", 0)
    ledger.start_phase("1-1 RL", 0)
    times = "UPDATE phases SET started_at = ?, ended_at = ? WHERE name = ?"
    ledger.connection.execute(times, (STARTED, STARTED + 100, "1-1 buffer"))
    ledger.connection.execute(times, (STARTED + 100, None, "1-1 RL"))
    return ledger


@pytest.mark.parametrize("last", ["rollouts", "teacher_answers", "evaluations", "decisions", "metrics", "nothing"])
def test_a_phase_that_is_not_done_ends_at_its_last_sign_of_life(last: str, tmp_path: Path) -> None:
    with killed_run(tmp_path) as ledger:
        answer = ScoredRollout(
            Rollout("a", 0, (1,), (-0.1,), "!", "stop", ((1, 0, 1),)), 1.0, {"task": 1.0}, True, None
        )
        ledger.record_rollouts("1-1 RL", 0, [answer])
        ledger.record_teacher("1-1 RL", [TeacherAnswer("a", 0, 0, "oracle", "!", 1.0, True, True, None, 1)])
        ledger.record_evaluation("1-1 RL", 1, "eval", {}, [])
        ledger.decide("1-1 RL", 1, "stagnation", {}, "")
        for table in ("rollouts", "teacher_answers", "evaluations", "decisions"):
            at = STARTED + (350 if table == last else 50 if last == "nothing" else 150)
            ledger.connection.execute(f"UPDATE {table} SET written_at = ?", (at,))
    at = STARTED + (350 if last == "metrics" else 60)
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "time": {at}, "rl/reward": 0.5}}\n{{"step": 1, "time": null}}\n'
    )
    found = overview_of(tmp_path)
    until = {phase["name"]: phase["until"] for phase in found["phases"]}
    expected = STARTED + (100 if last == "nothing" else 350)
    assert until == {"1-1 buffer": STARTED + 100, "1-1 RL": expected, "1-2 SFT": None}
    assert (found["facts"]["started"], found["facts"]["ended"]) == (STARTED, expected)
