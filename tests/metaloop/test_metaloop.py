"""The whole loop on the small tabletop, as real processes: it ends, it is right, and a kill changes nothing."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from dppo_mcore.practice.ledger import Ledger
from tests.data.test_damaged_pool import make_pool
from tests.metaloop import harness
from tests.support.sglang_server import PYTHON as SGLANG_PYTHON


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tabletop."""
    return harness.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    harness.finish(harness.command(world, run), run.with_suffix(".log"))
    return run


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


@pytest.mark.kill
def test_twenty_kills_leave_the_same_ledger(world: Path, unbroken: Path, tmp_path: Path) -> None:
    chance = random.Random(5)
    kills = number = 0
    while kills < 20:
        number += 1
        arguments, log = harness.command(world, tmp_path / f"run-{number}"), tmp_path / f"log-{number}"
        # Four instants a run: start-up takes the first seconds of every try, what follows it is hit at random.
        for _ in range(4):
            if not harness.kill_after(arguments, log, 5 + chance.random() * 15):
                break
            kills += 1
        harness.finish(arguments, log)
        assert harness.digest(tmp_path / f"run-{number}") == harness.digest(unbroken), f"run {number}"
    print(f"{kills} kills in {number} runs")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_two_ranks_go_through_every_phase(world: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    harness.finish(harness.command(world, tmp_path / "run", ranks=2, **layout), tmp_path / "log")
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        assert all(phase.state == "done" for phase in ledger.phases())


@pytest.mark.slow
@pytest.mark.sglang
def test_the_loop_runs_on_the_real_sglang(world: Path, tmp_path: Path) -> None:
    options = {"rollout_engine": "sglang", "rollout_python": SGLANG_PYTHON, "buffer_samples": 32, "eval_samples": 8}
    harness.finish(harness.command(world, tmp_path / "run", **options), tmp_path / "log")
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        assert all(phase.state == "done" for phase in ledger.phases())
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
