"""What single figures, tables and controls of the page show, in real headless Chromium. Run by `make test-report`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dppo_mcore.practice.ledger import Ledger, PhasePlan
from dppo_mcore.report.blocks import Limits
from dppo_mcore.report.page import write
from dppo_mcore.types import Rollout, Sample, ScoredRollout, Turn
from tests.report.driver import walk
from tests.report.synthetic import make_run

pytestmark = pytest.mark.report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run", rollouts=4000, clips=2)


def small_run(folder: Path, **samples: object) -> Path:
    """One RL phase with a rollout for each sample; samples are given by id with their gold answers."""
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.add_samples(
            [Sample(name, "exact", (Turn("user", f"{name} ?"),), gold=gold) for name, gold in samples.items()], "rl"
        )
        ledger.plan([PhasePlan("1-1 RL", 1, "rl", 32.0)])
        ledger.start_phase("1-1 RL", 0)
        answers = [Rollout(name, 0, (1,), (-0.1,), f"I say {name}", "stop", ((1, 0, 1),)) for name in samples]
        ledger.record_rollouts("1-1 RL", 0, [ScoredRollout(one, 1.0, {"task": 1.0}, True, None) for one in answers])
    return folder


def test_steps_of_a_phase_are_steps_of_the_run(run: Path, node_modules: Path) -> None:
    with Ledger(run / "ledger.sqlite") as ledger:
        known = {phase.name: phase for phase in ledger.phases()}
    [table] = walk(write(run), node_modules, [("table", "Wall time")])
    steps = {row[0]: row[table[0].index("steps")] for row in table[1:]}
    first, second = known["1-1 RL"], known["2-1 RL"]
    assert first.end_step == second.end_step == 12 and second.start_step == 6 + 12 + 6
    assert steps["1-1 RL"] == "6 to 18" and steps["2-1 RL"] == "24 to 36"
    assert steps["1-1 buffer"] == steps["1-2 weakness"] == ""


def test_numbers_that_are_none_are_shown_by_name(tmp_path: Path, node_modules: Path) -> None:
    folder = small_run(tmp_path, odd=float("nan"), even="4")
    parts = {"score": float("nan"), "success": 0.5, "extremity": 0.1, "flatness": float("inf"), "change": None}
    numbers = {"score": float("nan"), "tasks": {"exact": {**parts, "window": 1, "prompts": 2}}, "frozen": []}
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.decide("1-1 RL", 1, "stagnation", numbers, "a collapsed run")
        answer = Rollout("odd", 1, (1,), (-0.1,), "!", "stop", ((1, 0, 1),))
        ledger.record_rollouts("1-1 RL", 0, [ScoredRollout(answer, float("inf"), {"task": 1.0}, True, None)])
    (folder / "metrics.jsonl").write_text('{"step": 1, "phase": "1-1 RL", "rl/stagnation": 0.5}\n')
    gold, rollouts, other, table = walk(
        write(folder, limits=Limits(frame_samples=0)),
        node_modules,
        [("click", "#samples .list button >> text=odd"), ("wait", ".detail .pair"), ("text", ".detail .pair"),
         ("text", ".detail .answers"), ("click", "#samples .list button >> text=even"),
         ("wait", ".detail .tags >> text=even"), ("text", ".detail .pair"), ("texts", "#practice td")],
    )  # fmt: skip
    assert gold == "GoldNaN" and "reward Infinitytask 1" in rollouts and other == "Gold4"
    assert table[:5] == ["exact", "NaN", "50.0%", "0.100", "Infinity"]


def test_a_sample_that_cannot_be_unpacked_says_so_and_is_tried_again(tmp_path: Path, node_modules: Path) -> None:
    report = write(small_run(tmp_path, whole="1"), limits=Limits(frame_samples=0))
    page = report.read_text()
    found = re.search(r'id="samples-0">([^<]*)<', page)
    assert found
    report.write_text(page.replace(found.group(1), found.group(1)[:40]))
    mended = f'document.getElementById("samples-0").textContent = "{found.group(1)}"'
    broken, whole = walk(
        report,
        node_modules,
        [("click", "#samples .list button"), ("wait", ".detail [role=alert]"), ("text", ".detail"),
         ("run", f"{{ {mended} }}"), ("click", "#samples .list button"), ("wait", ".detail .answers"),
         ("text", ".detail .answers .text")],
    )[0:3:2]  # fmt: skip
    assert "This sample can't be shown" in broken and whole == "I say whole"


def test_a_killed_run_shows_the_time_it_ran(tmp_path: Path, node_modules: Path) -> None:
    folder = small_run(tmp_path, one="1")
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.connection.execute("UPDATE phases SET started_at = 1000")
        ledger.connection.execute("UPDATE rollouts SET written_at = 1250")
    table, note, figures = walk(
        write(folder, limits=Limits(frame_samples=0)),
        node_modules,
        [("table", "Wall time"), ("text", "#timeline figure .note"), ("text", "#summary dl")],
    )
    assert table[1][table[0].index("time")] == "4 min 10 s" and "Interruptions included" in note
    assert "Wall time4 min 10 sinterruptions included" in figures


@pytest.mark.parametrize(
    ("aggregate", "line", "words"),
    [
        ("mean", "ends at 0.6", "when the mean of the objectives' stagnation scores reaches 0.6"),
        ("all", "ends when every objective is at 0.6", "every objective is at least 0.6 in the same step"),
        ("freeze", "an objective rests from 0.6 on", "is drawn no more"),
    ],
)
def test_the_threshold_says_whose_score_ends_a_phase(
    aggregate: str, line: str, words: str, tmp_path: Path, node_modules: Path
) -> None:
    folder = small_run(tmp_path, one="1")
    practice = f"practice:\n  stagnation_threshold: 0.6\n  stagnation_aggregate: {aggregate}\n"
    (folder / "config.yaml").write_text("run:\n  note: 'stagnation_threshold: 0.2'\n" + practice)
    (folder / "metrics.jsonl").write_text('{"step": 1, "phase": "1-1 RL", "rl/stagnation": 0.5}\n')
    lead, texts = walk(
        write(folder, limits=Limits(frame_samples=0)),
        node_modules,
        [("text", "#practice .lead"), ("texts", "#practice svg text")],
    )
    assert words in lead and line in texts


def test_times_round_to_whole_minutes(tmp_path: Path, node_modules: Path) -> None:
    names = {119.4: "119 s", 119.6: "2 min 0 s", 3599.7: "60 min 0 s", 7199.7: "2 h 0 min", 10790.0: "3 h 0 min"}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.plan([PhasePlan(name, 1, "buffer") for name in names.values()])
        for seconds, name in names.items():
            ledger.start_phase(name, 0)
            ledger.finish_phase(name, 0)
            times = "UPDATE phases SET started_at = 1000, ended_at = ? WHERE name = ?"
            ledger.connection.execute(times, (1000 + seconds, name))
    [table] = walk(write(tmp_path), node_modules, [("table", "Wall time")])
    shown = {row[0]: row[table[0].index("time")] for row in table[1:]}
    assert shown == {name: name for name in names.values()}


def test_a_rollout_tells_its_step_as_the_curves_count(tmp_path: Path, node_modules: Path) -> None:
    folder = small_run(tmp_path, one="1")
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.plan([PhasePlan("2-1 buffer", 2, "buffer", 32.0)])
        answer = Rollout("one", 0, (1,), (-0.1,), "I say one", "stop", ((1, 0, 1),))
        scored = ScoredRollout(answer, 1.0, {"task": 1.0}, True, None)
        ledger.record_rollouts("2-1 buffer", 4, [scored])
        ledger.record_evaluation("1-1 RL", 1, "eval", {}, [scored])
    heads = walk(
        write(folder, limits=Limits(frame_samples=0)),
        node_modules,
        [("click", "#samples .list button"), ("wait", ".detail .answers"), ("texts", ".detail .head")],
    )[0]
    assert "1-1 RL, step 1 of the phase, answer 1" in heads[0] and "2-1 buffer, chunk 5, answer 1" in heads[1]
    assert "after step 1 of the phase" in heads[2]


def test_many_bars_stay_drawable(tmp_path: Path, node_modules: Path) -> None:
    objectives = [f"objective {k}" for k in range(70)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_samples([Sample(name, name, (Turn("user", "?"),)) for name in objectives], "eval")
        ledger.plan([PhasePlan("1-1 RL", 1, "rl")])
        answers = [Rollout(name, 0, (1,), (-0.1,), "!", "stop", ((1, 0, 1),)) for name in objectives]
        scored = [ScoredRollout(answer, 1.0, {"task": 1.0}, True, None) for answer in answers]
        ledger.record_evaluation("1-1 RL", 1, "eval", {}, scored)
    smallest = (
        "Math.min(...[...document.querySelectorAll('#progress figure rect')].map((one) => one.width.baseVal.value))"
    )
    assert walk(write(tmp_path, limits=Limits(frame_samples=0)), node_modules, [("run", smallest)]) == [1]


def evaluated_run(folder: Path, shares: list[tuple[str, int, float]], done: str) -> Path:
    """A buffer and an RL phase, evaluated on four samples: (phase, step, share that is right)."""
    names = [f"eval {k}" for k in range(4)]
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.add_samples([Sample(name, "exact", (Turn("user", "?"),)) for name in names], "eval")
        ledger.plan([PhasePlan("1-1 buffer", 1, "buffer"), PhasePlan("1-1 RL", 1, "rl")])
        for phase in ("1-1 buffer", "1-1 RL"):
            ledger.start_phase(phase, 0)
            if phase in done:
                ledger.finish_phase(phase, 30)
        for phase, step, share in shares:
            answers = [Rollout(name, 0, (1,), (-0.1,), "!", "stop", ((1, 0, 1),)) for name in names]
            scored = [ScoredRollout(one, 1.0, {"task": 1.0}, k < 4 * share, None) for k, one in enumerate(answers)]
            ledger.record_evaluation(phase, step, "eval", {}, scored)
            ledger.record_evaluation(phase, step, "eval-general", {}, scored)
    rows = [{"step": step, "eval/success": share, "eval/success/exact": share, "eval/general": share}
            for _, step, share in shares]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("shares", "done", "title", "order"),
    [
        ([("1-1 buffer", 0, 0.25), ("1-1 RL", 10, 0.75), ("1-1 RL", 20, 0.5)], "1-1 buffer",
         "went from 25.0% to 50.0%", "at the start, during 1-1 RL, step 20."),
        ([("1-1 RL", 10, 0.0), ("1-1 RL", 20, 0.25), ("1-1 RL", 30, 1.0)], "1-1 buffer, 1-1 RL",
         "went from 0.0% to 100.0%", "during 1-1 RL, step 10, after 1-1 RL."),
    ],
)  # fmt: skip
def test_evaluations_within_a_phase(
    shares: list[tuple[str, int, float]], done: str, title: str, order: str, tmp_path: Path, node_modules: Path
) -> None:
    """One of a phase that goes on is no "after" it; the first of all is what the last is compared with."""
    headline, note, held_out, general, points, forgetting = walk(
        write(evaluated_run(tmp_path, shares, done), limits=Limits(frame_samples=0)),
        node_modules,
        [("text", "h1"), ("text", "#progress figure .note"), ("table", "Held-out success"), ("table", "General set"),
         ("run", "document.querySelectorAll('#curves figure circle').length"),
         ("text", "#progress .grid figure .note")],
    )  # fmt: skip
    assert title in headline and note.endswith(order)
    assert held_out[0] == ["step", "all", "exact"] and len(held_out) == 1 + len(shares)
    assert general == [["step", "all"], *([str(step), f"{share:g}"] for _, step, share in shares)]
    assert points == 3 * len(shares)
    assert forgetting.startswith("+25.0 points" if "25.0%" in title else "+100.0 points")


def searched_run(folder: Path) -> Path:
    """Samples with long questions that differ at their end, some right and some wrong."""
    names = [f"sample-{k}" for k in range(30)]
    with Ledger(folder / "ledger.sqlite") as ledger:
        filler = "the cup stands on the left of the tray " * 20
        samples = [Sample(name, "exact", (Turn("user", f"{filler} and where is {name[::-1]} ?"),)) for name in names]
        ledger.add_samples(samples, "rl")
        ledger.plan([PhasePlan("1-1 RL", 1, "rl"), PhasePlan("2-1 RL", 2, "rl")])
        for phase in ("1-1 RL", "2-1 RL"):
            answers = [Rollout(name, 0, (1,), (-0.1,), "!", "stop", ((1, 0, 1),)) for name in names]
            scored = [ScoredRollout(one, 1.0, {"task": 1.0}, k % 3 > 0, None) for k, one in enumerate(answers)]
            ledger.record_rollouts(phase, 0, scored)
    return folder


def test_filters_search_whole_questions_and_take_empty_bounds_for_none(tmp_path: Path, node_modules: Path) -> None:
    found = ("text", "#samples [role=status]")
    steps = [
        ("fill", "[name=text]", "where is 71-elpmas"), found, ("texts", ".list .question"), ("fill", "[name=text]", ""),
        ("fill", "[name=high]", "50"), found, ("fill", "[name=high]", ""), found,
        ("fill", "[name=low]", "50"), found, ("fill", "[name=low]", ""), found,
    ]  # fmt: skip
    report = write(searched_run(tmp_path), limits=Limits(frame_samples=0))
    late, questions, wrong, everyone, right, again = walk(report, node_modules, steps)
    assert late.startswith("1 found") and len(questions[0]) == 110
    assert wrong.startswith("10 found") and everyone.startswith("30 found")
    assert right.startswith("20 found") and again.startswith("30 found")


def test_what_is_left_out_is_told_by_its_reason(tmp_path: Path, node_modules: Path) -> None:
    folder = searched_run(tmp_path)
    open_first = [("click", "#samples .list button"), ("wait", ".detail .tags")]
    looked_at = [("text", "#samples .lead"), *open_first, ("texts", ".detail .note")]
    lead, notes = walk(write(folder, limits=Limits(rollouts=30, frame_samples=0)), node_modules, looked_at)
    assert "30 of 60 rollouts in this file. 30 are left out as older than the newest 30 (--max-rollouts)." in lead
    assert "--max-megabytes" not in lead and lead.endswith("The ledger has all.")
    assert notes == ["In the ledger only, as older than the newest 30 (--max-rollouts): 1 of its rollouts."]
    lead, notes = walk(write(folder, limits=Limits(megabytes=0.01, frame_samples=0)), node_modules, looked_at)
    assert (
        "The details of 30 samples, 60 rollouts among them, are left out: the file would be larger than 0.01 MB" in lead
    )
    assert "--max-rollouts" not in lead and len(notes) == 1
    assert notes[0].startswith(
        "The details of this sample are in the ledger only: the file would be larger than 0.01 MB"
    )
