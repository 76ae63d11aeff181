"""kill -9 at random instants of a writing run: the file stays sound, nothing is lost or doubled."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dppo_mcore.practice.ledger import Ledger

ROOT = Path(__file__).parents[2]
WRITER = """
import sys
from pathlib import Path
from dppo_mcore.practice.ledger import Ledger, PhasePlan, TeacherAnswer
from dppo_mcore.types import Rollout, Sample, ScoredRollout

ledger = Ledger(sys.argv[1])
acknowledged = open(sys.argv[2], "a", buffering=1)
ledger.add_samples([Sample(f"s{i}", "counting", ()) for i in range(200)], "rl")
ledger.plan([PhasePlan("1-1 RL", 1, "rl")])
ledger.start_phase("1-1 RL", 0)
for step in range(int(sys.argv[3])):
    rows = []
    for prompt in range(8):
        for index in range(8):
            ids = (step, prompt, index)
            rollout = Rollout(f"s{(step * 8 + prompt) % 200}", index, ids, (-0.5,) * 3, f"{ids} " * 40, "stop")
            rows.append(ScoredRollout(rollout, 1.0, {"format": 1.0, "task": 1.0}, index % 2 == 0))
    if len(ledger.recorded("1-1 RL", step)) < 64:
        ledger.record_rollouts("1-1 RL", step, rows)
    ledger.record_teacher("1-1 RL", [TeacherAnswer(f"s{step % 200}", 0, step, "t", "x", 1.0, True, False, None, 1)])
    ledger.decide("1-1 RL", step, "mark", {"step": step}, "")
    ledger.set_cursor("1-1 RL", {"step": step})
    acknowledged.write(f"{step}\\n")
ledger.finish_phase("1-1 RL", step, "done")
"""


def start(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", WRITER, str(folder / "ledger.sqlite"), str(folder / "done"), str(steps)]
    return subprocess.Popen(arguments, cwd=ROOT)


def kill_again_and_again(folder: Path, kills: int, steps: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        run = start(folder, steps)
        marks = folder / "done"
        before = marks.stat().st_size if marks.exists() else -1
        deadline = time.monotonic() + 60
        while run.poll() is None and time.monotonic() < deadline:
            if marks.exists() and marks.stat().st_size > before:
                break  # it writes; now kill it at any instant of that
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        run.kill()
        run.wait()
        with Ledger(folder / "ledger.sqlite") as ledger:
            assert ledger.integrity() == "ok"
            for step in {int(line) for line in marks.read_text().split()}:
                assert len(ledger.recorded("1-1 RL", step)) == 64, f"step {step} was acknowledged and is gone"


def check(tmp_path: Path, kills: int, steps: int) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    broken.mkdir()
    whole.mkdir()
    kill_again_and_again(broken, kills, steps, seed=kills)
    assert start(broken, steps).wait() == 0 and start(whole, steps).wait() == 0
    with Ledger(broken / "ledger.sqlite") as one, Ledger(whole / "ledger.sqlite") as other:
        assert one.integrity() == "ok"
        assert [json.dumps(row, default=repr) for _, row in one.dump()] == [
            json.dumps(row, default=repr) for _, row in other.dump()
        ]
        assert one.digest() == other.digest()


def test_a_few_kills(tmp_path: Path) -> None:
    check(tmp_path, kills=2, steps=60)


@pytest.mark.kill
def test_fifty_kills(tmp_path: Path) -> None:
    check(tmp_path, kills=50, steps=1500)
