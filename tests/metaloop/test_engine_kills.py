"""A whole run on a real SGLang beside the trainer, its processes killed from outside between and inside steps."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from dppo_mcore.practice.ledger import Ledger
from tests.metaloop import harness
from tests.metaloop.test_carrying import OPTIONS
from tests.support.sglang_server import PYTHON

pytestmark = [pytest.mark.kill, pytest.mark.sglang]
KILLS = 4


def family(pid: int) -> list[int]:
    """All living processes below a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == pid and words[0] != "Z":
            found += [int(stat.parent.name), *family(int(stat.parent.name))]
    return found


def engine_processes(trainer: int) -> list[int]:
    """The sidecar of a run and its workers; none while it isn't up."""
    for pid in family(trainer):
        if b"dppo_mcore.rollout.sidecar" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return [pid, *family(pid)]
    return []


def recorded(run: Path) -> int:
    """Rollouts in the ledger so far."""
    if not (run / "ledger.sqlite").exists():
        return 0
    with Ledger(run / "ledger.sqlite", write=False) as ledger:
        return sum(1 for _ in ledger.all_rollouts())


def test_a_run_outlives_its_engines(tmp_path: Path) -> None:
    """Disjoint engine, weights by broadcast, partial rollouts: four kills, and the ledger is exact."""
    run, log, dice = tmp_path / "run", tmp_path / "log", random.Random(0)
    world = harness.make_world(tmp_path / "world")
    options = OPTIONS | {
        "rollout_engine": "sglang", "rollout_python": PYTHON, "rollout_placement": "disjoint",
        "weight_transport": "distributed", "rollout_timeout_s": 60, "rollout_retries": 5,
    }  # fmt: skip
    process = harness.start(harness.command(world, run, **options), log)
    kills, seen, deadline = 0, 0, time.monotonic() + 1800
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if kills < KILLS and (now := recorded(run)) > seen:
                time.sleep(dice.uniform(0.0, 1.5))
                if victims := engine_processes(process.pid):
                    os.kill(dice.choice(victims), signal.SIGKILL)
                    kills, seen = kills + 1, now
        assert process.wait(10) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert kills == KILLS
    with Ledger(run / "ledger.sqlite", write=False) as ledger:
        assert all(phase.state == "done" for phase in ledger.phases())
        counts = Counter((row.step, row.scored.rollout.sample_id) for row in ledger.all_rollouts("1-1 RL"))
        assert counts and set(counts.values()) == {4}
        versions = {v for row in ledger.all_rollouts("1-1 RL") for v, _, _ in row.scored.rollout.weight_versions}
    assert len(versions) >= 5
    restarts = log.read_text().count("is restarted")
    print(f"{kills} kills, {restarts} restarts, {sum(counts.values())} rollouts")
    assert restarts >= 1


def test_no_engine_outlives_its_run(tmp_path: Path) -> None:
    """SIGKILL to the trainer: its engine's processes are gone within ten seconds."""
    world = harness.make_world(tmp_path / "world")
    options = OPTIONS | {"rollout_engine": "sglang", "rollout_python": PYTHON}
    process = harness.start(harness.command(world, tmp_path / "run", **options), tmp_path / "log")
    try:
        deadline = time.monotonic() + 600
        while not recorded(tmp_path / "run"):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.2)
        engine = engine_processes(process.pid)
        assert len(engine) >= 3
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in engine) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in engine if Path(f"/proc/{pid}").exists()]
