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
CONFIG = """
run:
  note: 'not to be mistaken: stagnation_threshold: 0.1'
practice:
  stagnation_threshold: 0.8
  stagnation_aggregate: freeze
"""


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


@pytest.mark.parametrize(
    ("config", "threshold", "aggregate"),
    [(CONFIG, 0.8, "freeze"), ("practice: {stagnation_threshold: .nan}", 0.7, "mean"), ("no: [config", 0.7, "mean")],
)
def test_what_ends_a_phase_is_read_from_the_configuration(
    config: str, threshold: float, aggregate: str, tmp_path: Path
) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    (tmp_path / "config.yaml").write_text(config)
    assert overview_of(tmp_path)["facts"]["stagnation"] == {"threshold": threshold, "aggregate": aggregate}


def test_media_set_aside_are_counted_beyond_those_listed(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger, ledger.transaction():
        for number in range(600):
            ledger.quarantine(f"{number:03d}.mp4", "a", "truncated")
    facts = overview_of(tmp_path)["facts"]
    assert facts["quarantined"] == 600 and [one["path"] for one in facts["quarantine"]][-1] == "499.mp4"


def test_steps_of_a_phase_count_from_one(tmp_path: Path) -> None:
    with killed_run(tmp_path) as ledger:
        for step in range(3):
            answer = Rollout("a", 0, (1,), (-0.1,), "!", "stop", ((1, 0, 1),))
            ledger.record_rollouts("1-1 RL", step, [ScoredRollout(answer, 1.0, {"task": 1.0}, True, None)])
    [success] = overview_of(tmp_path)["success"]
    assert [step for step, _ in success["steps"]] == [step for step, _ in success["objective"]["exact"]] == [1, 2, 3]
