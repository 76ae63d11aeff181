"""Whole runs of every mode, longer ones, and ones in which there is little or nothing to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_mcore.practice.ledger import Ledger
from tests.metaloop import harness

pytestmark = pytest.mark.slow
SHORT = {"base_sft_steps": 2, "buffer_samples": 24, "eval_samples": 6, "rl_min_steps": 1, "rl_max_steps": 2,
         "prompts_per_step": 4, "sft_max_steps": 2, "last_sft": False}  # fmt: skip


def phases(run: Path) -> dict[str, int]:
    """Steps of each phase, all of them done."""
    with Ledger(run / "ledger.sqlite", write=False) as ledger:
        assert ledger.integrity() == "ok" and all(phase.state == "done" for phase in ledger.phases())
        return {phase.name: phase.end_step or 0 for phase in ledger.phases()}


def go(world: Path, run: Path, **changes: Any) -> dict[str, int]:
    options = {**SHORT, "media_root": world, **changes}
    harness.finish(harness.command(world, run, **options), run.with_suffix(".log"))
    return phases(run)


def subset(world: Path, path: Path, rows: int, **changes: Any) -> Path:
    """The first rows of the pool with other fields."""
    kept = [json.loads(line) | changes for line in (world / "pool.jsonl").read_text().splitlines()[:rows]]
    for number, row in enumerate(kept):
        row["id"] = f"own-{number}"
    path.write_text("\n".join(map(json.dumps, kept)))
    return path


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("rl-only", ["1-1 buffer", "1-1 RL", "2-1 buffer", "2-1 RL"]),
        ("sft-only", ["1-2 weakness", "1-2 SFT", "2-2 weakness", "2-2 SFT"]),
        ("single-loop", ["1-1 buffer", "1-1 RL", "1-2 weakness", "1-2 SFT"]),
    ],
)
def test_modes(world: Path, tmp_path: Path, mode: str, names: list[str]) -> None:
    run = tmp_path / "run"
    assert list(go(world, run, mode=mode, loops=2, base_sft_steps=0)) == names
    with Ledger(run / "ledger.sqlite", write=False) as ledger:
        # The weights a run begins with are evaluated before anything else.
        assert (ledger.evaluations()[0].phase, ledger.evaluations()[0].step) == (names[0], 0)
        assert {e.name for e in ledger.evaluations()} == {"eval", "eval-general"}
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "eval/forgotten" in [row for row in logged if "eval/general" in row][-1]


@pytest.mark.parametrize("window", [1, 0])
def test_the_base_is_learnt_in_order_if_asked(world: Path, tmp_path: Path, window: int) -> None:
    """In the rows' own order a run's seed has no say in what its first SFT sees: equal losses under any seed."""
    losses = []
    for seed in (1, 2):
        run = tmp_path / f"run-{seed}"
        go(world, run, mode="rl-only", loops=1, seed=seed, base_sft_window=window, rl_max_steps=1)
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["sft/loss"] for row in logged if "sft/loss" in row])
    assert len(losses[0]) == 2 and (losses[0] == losses[1]) == (window == 1)


def frames_seen(folder: Path) -> set[int]:
    """How many frames the clips had in recorded batches."""

    def walk(value: Any) -> set[int]:
        if isinstance(value, dict):
            own = {len(value["indices"]["tuple"])} if value.get("record") == "FramePlan" else set()
            return own.union(*map(walk, value.values()))
        return set().union(*map(walk, value)) if isinstance(value, list | tuple) else set()

    return set().union(*(walk(torch.load(path, weights_only=True)) for path in folder.glob("*.pt")))


def test_two_loops_then_four(world: Path, tmp_path: Path) -> None:
    """A finished run of two loops goes on to four, changing nothing of what was; a longer horizon is really seen."""
    run = tmp_path / "run"
    oracle = harness.Oracle(world, seconds=0.0)
    options = {"horizons": "8 32", "dump_rollouts": tmp_path / "loops-2", "loops": 2, "teacher_file": "",
               "teacher_url": oracle.url, "teacher_model": "oracle"}  # fmt: skip
    command = harness.command(world, run, **{**SHORT, **options})
    place = command.index("8 32")
    command[place : place + 1] = ["8", "32"]
    harness.finish(command, run.with_suffix(".log"))
    first, facts = phases(run), [row for row in harness.rows(run) if row[0] != "phases"]
    assert list(first)[-2:] == ["2-1 buffer", "2-1 RL"] and len(first) == 7
    assert frames_seen(tmp_path / "loops-2") == {4, 16}
    assert oracle.images == {4}  # the teacher sees what the model saw in the loop it failed in
    command[command.index("--loops") + 1] = "4"
    harness.finish(command, run.with_suffix(".log"))
    longer = phases(run)
    assert oracle.images == {4, 16}
    oracle.close()
    assert list(longer)[:7] == list(first) and all(longer[name] == steps for name, steps in first.items())
    assert list(longer)[7:] == ["2-2 weakness", "2-2 SFT", "3-1 buffer", "3-1 RL", "3-2 weakness", "3-2 SFT",
                                "4-1 buffer", "4-1 RL"]  # fmt: skip
    now = {json.dumps(row, default=repr) for row in harness.rows(run)}
    assert all(json.dumps(row, default=repr) in now for row in facts)


def test_everything_mastered(world: Path, tmp_path: Path) -> None:
    """Any answer is right: nothing to draw, nothing weak, nothing to learn, and the run ends."""
    scorer = tmp_path / "generous.py"
    scorer.write_text("from dppo_mcore.rewards import objective\n\n@objective('easy')\ndef easy(sample, answer):\n"
                      "    return 1.0\n")  # fmt: skip
    easy = subset(world, tmp_path / "easy.jsonl", 12, objective="easy")
    steps = go(world, tmp_path / "run", data=easy, objectives=scorer, loops=2)
    assert (steps["1-1 RL"], steps["1-2 SFT"], steps["2-1 RL"]) == (0, 0, 0)
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        assert ledger.phase("1-1 RL").reason == "nothing left to draw of 12 samples: 12 mastered"
        assert ledger.success_rates(["1-1 buffer"]) == {f"own-{number}": (4, 4) for number in range(12)}


def test_a_pool_smaller_than_a_step(world: Path, tmp_path: Path) -> None:
    small = subset(world, tmp_path / "pool.jsonl", 3)
    go(world, tmp_path / "run", data=small, loops=1, prompts_per_step=16, sampling="random")
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        assert len(ledger.rollouts("1-1 RL", 0)) == 3


def test_tasks_are_frozen_one_by_one(world: Path, tmp_path: Path) -> None:
    options = {"stagnation_aggregate": "freeze", "stagnation_window": 1, "stagnation_min_prompts": 1}
    steps = go(world, tmp_path / "run", loops=1, rl_max_steps=30, sampling="random", **options)
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        decision = ledger.decisions("stagnation")[0]
    assert steps["1-1 RL"] < 30 and len(decision.numbers["frozen"]) == len(decision.numbers["tasks"])
