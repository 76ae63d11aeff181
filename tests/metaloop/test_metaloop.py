"""The whole loop on the small tabletop, as real processes: it ends, it is right, and a kill changes nothing."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest

from dppo_mcore.practice.ledger import Ledger
from tests.data.test_damaged_pool import make_pool
from tests.metaloop import harness
from tests.support.sglang_server import PYTHON as SGLANG_PYTHON


def test_a_run_goes_through_every_phase_and_records_what_it_did(unbroken: Path) -> None:
    with Ledger(unbroken / "ledger.sqlite", write=False) as ledger:
        phases = ledger.phases()
        assert [p.name for p in phases] == ["base SFT", "1-1 buffer", "1-1 RL", "1-2 weakness", "1-2 SFT"]
        assert all(p.state == "done" for p in phases)
        for step in range(4):
            groups = ledger.rollouts("1-1 RL", step)
            assert len(groups) == 8 and all(len(group) == 8 for group in groups.values())
        kinds = Counter(decision.kind for decision in ledger.decisions())
        assert kinds["buffer"] == kinds["stagnation"] == kinds["weakness"] == kinds["corpus"] == 1
        sources = Counter(item.source for item in ledger.corpus("1-2 SFT"))
        assert sources["weak"] and sources["general"]
        assert all(item.why for item in ledger.corpus("1-2 SFT"))
        assert {e.phase for e in ledger.evaluations()} == {"base SFT", "1-1 RL", "1-2 SFT"}
    assert (unbroken / "config.yaml").is_file()
    logged = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in logged if row.get("phase") == "1-1 RL" and "rl/ratio" in row)
    assert abs(first["rl/ratio"] - 1) < 1e-6


def test_the_same_command_on_a_finished_run_does_nothing(world: Path, unbroken: Path) -> None:
    before = harness.digest(unbroken)
    harness.finish(harness.command(world, unbroken), unbroken.with_suffix(".log"))
    assert harness.digest(unbroken) == before


@pytest.mark.parametrize("seconds", [14.0])
def test_a_killed_run_ends_with_the_same_ledger(world: Path, unbroken: Path, tmp_path: Path, seconds: float) -> None:
    arguments = harness.command(world, tmp_path / "run")
    harness.kill_after(arguments, tmp_path / "log", seconds)
    harness.finish(arguments, tmp_path / "log")
    assert harness.digest(tmp_path / "run") == harness.digest(unbroken)


def test_sigterm_saves_and_the_same_command_goes_on(world: Path, unbroken: Path, tmp_path: Path) -> None:
    arguments, log = harness.command(world, tmp_path / "run"), tmp_path / "log"
    process = harness.start(arguments, log)
    deadline = time.monotonic() + 240
    while not log.exists() or b"RL step" not in log.read_bytes():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    assert b"resume with the same command" in log.read_bytes()
    harness.finish(arguments, log)
    assert harness.digest(tmp_path / "run") == harness.digest(unbroken)


STAGES = {
    "base SFT step    2/8": "SFT", "base SFT step    8/8": "evaluation", "base SFT step 8: held-out": "rollout",
    "1-1 buffer: 96 samples": "reward", "1-1 RL step    2": "RL", "1-1 RL step    3": "checkpoint",
    "1-1 RL ends": "checkpoint", "1-1 RL step 4: held-out": "rollout", "samples without a right": "teacher",
    "1-2 weakness: teacher": "corpus", "1-2 SFT step    1/5": "SFT", "1-2 SFT step    3/5": "checkpoint",
    "1-2 SFT step    5/5": "evaluation",
}  # fmt: skip
"""Log lines in order, and what a run does in the second behind them."""


@pytest.mark.kill
def test_twenty_kills_leave_the_same_ledger(world: Path, tmp_path: Path) -> None:
    chance = random.Random(5)
    oracle = harness.Oracle(world, seconds=0.1)
    options = {"teacher_file": "", "teacher_url": oracle.url, "teacher_model": "oracle", "teacher_answers": 2}

    def command(name: str) -> list[str]:
        return harness.command(world, tmp_path / name, teacher_concurrency=8, **options)

    harness.finish(command("whole"), tmp_path / "whole.log")
    whole = harness.digest(tmp_path / "whole")
    hit: Counter[str] = Counter()
    number = 0
    while hit.total() < 20:
        number += 1
        arguments, log = command(f"run-{number}"), tmp_path / f"log-{number}"
        # Every second stage of the list from the first or second on: two runs go through all of them.
        for mark in list(STAGES)[number % 2 :: 2]:
            if harness.kill_behind(arguments, log, mark, chance.random()):
                hit[STAGES[mark]] += 1
        harness.finish(arguments, log)
        if harness.digest(tmp_path / f"run-{number}") != whole:
            pairs = zip_longest(harness.rows(tmp_path / f"run-{number}"), harness.rows(tmp_path / "whole"))
            differ = [pair for pair in pairs if pair[0] != pair[1]]
            pytest.fail(f"run {number}: {len(differ)} rows differ, the first: {str(differ[0])[:2000]}")
    oracle.close()
    print(f"{hit.total()} kills in {number} runs: {dict(hit)}")
    assert {"SFT", "rollout", "reward", "RL", "teacher", "checkpoint", "evaluation"} <= set(hit)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_two_ranks_go_through_every_phase(world: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    harness.finish(harness.command(world, tmp_path / "run", ranks=2, **layout), tmp_path / "log")
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        assert all(phase.state == "done" for phase in ledger.phases())


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.parametrize("offload", [False, True])
def test_the_loop_runs_on_the_real_sglang(world: Path, tmp_path: Path, offload: bool) -> None:
    """With `offload` engine and trainer take turns; the engine refuses to answer while it should sleep."""
    options = {
        "offload": offload,
        "rollout_engine": "sglang",
        "rollout_python": SGLANG_PYTHON,
        "buffer_samples": 32,
        "eval_samples": 8,
        "loops": 2,
        "last_sft": False,
    }
    harness.finish(harness.command(world, tmp_path / "run", **options), tmp_path / "log")
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        assert all(phase.state == "done" for phase in ledger.phases())
        assert [p.name for p in ledger.phases() if p.kind in ("rl", "sft")] == ["1-1 RL", "1-2 SFT", "2-1 RL"]
        versions = {v[0] for row in ledger.all_rollouts("1-1 RL") for v in row.scored.rollout.weight_versions}
        assert len(versions) == 4


@pytest.mark.slow
def test_training_goes_through_a_pool_with_damaged_clips(world: Path, tmp_path: Path) -> None:
    manifest, ways = make_pool(tmp_path)
    # 60 steps of 16 see every one of the 994 readable rows once, and a few twice.
    options = {"base_data": manifest, "base_sft_steps": 63, "mode": "rl-only", "rl_max_steps": 2, "fps": 4}
    harness.finish(harness.command(world, tmp_path / "run", **options), tmp_path / "log")
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        assert all(phase.state == "done" for phase in ledger.phases())
        named = {Path(path).stem for path in ledger.quarantined()}
    assert named == {name for name, way in ways.items() if way != "outside"}
