"""SIGTERM while a run evaluates: it ends at the next chunk, loses no step, and the same command ends as if unbroken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dppo_mcore.learn import checkpoint
from dppo_mcore.metaloop import evaluation
from dppo_mcore.metaloop.rolling import Batch
from dppo_mcore.practice.ledger import Ledger
from dppo_mcore.rollout.base import Sampling
from dppo_mcore.runtime import faults
from dppo_mcore.types import Sample
from tests.metaloop import harness

OPTIONS = {
    "dtype": "fp32", "mode": "rl-only", "loops": 1, "kl-coef": 0, "sampling": "random", "group-size": 4,
    "prompts-per-step": 4, "rl-lr": 1e-2, "rl-min-steps": 5, "rl-max-steps": 5, "max-prompt-tokens": 256,
    "max-response-tokens": 4, "max-tokens-per-micro-batch": 1024, "data-workers": 0, "reward-workers": 0,
    "eval-interval": 2, "save-interval": 100,
}  # fmt: skip
STOPPED = """
import os, signal, sys
from dppo_mcore.metaloop import evaluation
from dppo_mcore.train import main

evaluation.CHUNK, roll_out, at = 4, evaluation.roll_out, sys.argv.pop(1)

def stopped(*arguments, label, **others):
    if label == at:
        os.kill(os.getpid(), signal.SIGTERM)
    return roll_out(*arguments, label=label, **others)

evaluation.roll_out = stopped
main()
"""
"""A run that is stopped in an evaluation's chunk."""


def test_the_resumed_run_ends_as_the_unbroken_one(tiny_dir: str, tmp_path: Path) -> None:
    """Stopped before anything was trained, inside the RL phase and at its end, in one set and between two."""
    (tmp_path / "odd.py").write_text(
        "from dppo_mcore.rewards import objective\n\n@objective('odd')\ndef odd(sample, answer):\n"
        "    return float(sum(map(ord, answer)) % 2)\n"
    )
    files = {"data": 16, "eval-data": 10, "eval-general-data": 6}
    for name, rows in files.items():
        lines = [{"id": f"{name}-{n}", "objective": "odd", "messages": [{"role": "user", "content": f"{name} {n} ?"}],
                  "gold": "x"} for n in range(rows)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {**OPTIONS, "model": tiny_dir, "objectives": tmp_path / "odd.py"}
    options |= {name: tmp_path / f"{name}.jsonl" for name in files}

    def command(run: str, label: str = "") -> list[str]:
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        begin = [sys.executable, "-W", "ignore", "-c", STOPPED, label]
        return [*begin, *flags, "--no-tensorboard", "--run-folder", str(tmp_path / run)]

    harness.finish(command("whole"), tmp_path / "whole.log")
    log = tmp_path / "log"
    for label, saved in (("eval eval 0/4", None), ("eval eval-general 2/0", 2), ("eval eval 5/0", 5)):
        harness.finish(command("run", label), log)
        assert log.read_text().splitlines()[-1] == faults.RESUME_HINT
        newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
        assert (newest and checkpoint.read_meta(newest)["extra"]["phase_step"]) == saved
    harness.finish(command("run"), log)
    assert harness.digest(tmp_path / "run") == harness.digest(tmp_path / "whole")
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        evaluated = [(entry.phase, entry.step, entry.name) for entry in ledger.evaluations()]
    places = [("1-1 buffer", 0), ("1-1 RL", 2), ("1-1 RL", 4), ("1-1 RL", 5)]
    assert evaluated == [(*place, name) for place in places for name in ("eval", "eval-general")]
    for step in range(1, 6):
        assert log.read_text().count(f"1-1 RL step {step:4d}  ") == 1  # nothing was trained twice
    scores = [
        {
            path.name: checkpoint.read_meta(path)["score"]
            for path in checkpoint.checkpoints(tmp_path / run / "checkpoints")
        }
        for run in ("run", "whole")
    ]
    assert scores[0] == scores[1] and None not in scores[0].values()


def test_a_stop_is_seen_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a chunk, on all ranks alike; the engine has gone to sleep by then."""
    events: list[str] = []

    class Awake:
        def __init__(self, run: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, kind: Any, *_: Any) -> None:
            events.append("asleep" if kind is None else "left awake")

    def roll_out(run: Any, ids: list[str], n: int, *, label: str, **_: Any) -> Batch:
        events.append(label)
        return Batch([], {})

    monkeypatch.setattr(evaluation, "awake", Awake)
    monkeypatch.setattr(evaluation, "roll_out", roll_out)
    monkeypatch.setattr(evaluation, "CHUNK", 2)
    monkeypatch.setattr(faults, "stop_requested", lambda: len(events) == 2)
    config = SimpleNamespace(practice=SimpleNamespace(horizons=(8.0,)))
    exchange = SimpleNamespace(at_rank0=lambda values: values)
    samples = [Sample(str(number), "exact", ()) for number in range(9)]
    run: Any = SimpleNamespace(config=config, exchange=exchange, step=3, pools={"eval": samples}, sampling=Sampling())
    with pytest.raises(faults.Preempted):
        evaluation.answer_pool(run, "eval")
    assert events == ["eval eval 3/0", "eval eval 3/2", "asleep"]
    assert evaluation.answer_pool(run, "eval", limit=3) == ([], [])
    assert events[3:] == ["eval eval 3/0", "eval eval 3/2", "asleep"]


@pytest.mark.slow
def test_the_command_writes_nothing_and_says_so(tiny_dir: str, tmp_path: Path) -> None:
    """Status 1: no answer is kept that a second start could go on from."""
    data = tmp_path / "eval.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "?"}], "gold": "x"}\n' * 5)
    script = STOPPED.replace("dppo_mcore.train", "dppo_mcore.evaluate")
    arguments = ["--model", tiny_dir, "--data", data, "--out", tmp_path / "out.json", "--data-workers", 0]
    command = [sys.executable, "-W", "ignore", "-c", script, "eval eval 0/0", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=harness.environment(), cwd=harness.ROOT)
    assert done.returncode == 1 and not (tmp_path / "out.json").exists()
    assert done.stderr == "error: stopped by SIGTERM before the last answer; nothing was written\n"
