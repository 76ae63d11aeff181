"""Worker processes: order kept, hung and dying scorers cost only their own answer, nothing outlives the pool."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dppo_mcore.rewards import Rubric
from dppo_mcore.rewards.pool import RewardPool
from dppo_mcore.types import Rollout, Sample

SCORERS = """
import os, time
from dppo_mcore.rewards import objective

@objective("user")
def user(sample, answer):
    if answer == "hang":
        while True:
            pass
    if answer == "die":
        os._exit(3)
    if answer == "raise":
        raise ValueError("no such thing")
    if answer == "pid":
        open(sample.gold, "w").write(str(os.getpid()))
        time.sleep(600)
    return float(answer)
"""


@pytest.fixture
def scorers(tmp_path: Path) -> str:
    path = tmp_path / "scorers.py"
    path.write_text(SCORERS)
    return str(path)


def test_order_time_limit_and_crashes(scorers: str) -> None:
    sample = Sample("s", "user", ())
    answers = ["1", "hang", "raise", "0.5", "die", "nan", "0.25", "7"]
    with RewardPool(2, timeout_s=1.0, objectives=scorers, rubric=Rubric(structure="plain")) as pool:
        scores = pool.score([(sample, text) for text in answers])
        assert pool.restarts == 2
        again = pool.score([(sample, "1")] * 100)
    assert [s.parts["task"] for s in scores] == [1, 0, 0, 0.5, 0, 0, 0.25, 1]
    assert [s.error for s in scores] == [
        None,
        "scorer took longer than 1 s",
        "ValueError: no such thing",
        None,
        "scorer ended its worker process",
        "scorer of 'user' gave nan",
        None,
        None,
    ]
    assert [s.reward for s in again] == [1.0] * 100


def test_in_place(scorers: str) -> None:
    with RewardPool(0, objectives=scorers) as pool:
        rollout = Rollout("s", 0, (1,), (0.0,), "<think>a</think><answer>1</answer>", "stop")
        scored = pool.score_rollouts([Sample("s", "user", ())], [rollout])
    assert scored[0].rollout is rollout and scored[0].reward == 1 and scored[0].success


def test_a_broken_file_is_an_error_at_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nonesuch")
    with pytest.raises(ModuleNotFoundError):
        RewardPool(1, objectives=str(broken))
    with pytest.raises(FileNotFoundError, match="objectives: no file"):
        RewardPool(1, objectives=str(tmp_path / "missing.py"))


def test_workers_die_with_a_killed_run(scorers: str, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    program = (
        "from dppo_mcore.rewards.pool import RewardPool\nfrom dppo_mcore.types import Sample\n"
        f"RewardPool(1, objectives={scorers!r}).score([(Sample('s', 'user', (), gold={str(mark)!r}), 'pid')])"
    )
    run = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(mark.read_text())
    run.kill()
    run.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its run")
