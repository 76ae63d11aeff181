"""Logs, metrics and the progress bar: everything where it belongs, nothing lost when a rank is ended."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dppo_mcore.runtime.log import progress

ROOT = Path(__file__).resolve().parents[2]
ENDED_RANK = """
import os, sys
from pathlib import Path
from dppo_mcore.runtime.log import Metrics, get_logger, start_logging
run, rank = Path(sys.argv[1]), int(sys.argv[2])
start_logging(run, rank)
metrics = Metrics(run if rank == 0 else None)
metrics.log(7, {"rl/loss": 0.5, "rl/ratio": float("nan")}, phase="1-1 RL")
get_logger().info(f"step 7 of rank {rank}")
os._exit(1)
"""


def test_every_rank_has_its_log_and_rank_0_the_screen_and_the_figures(tmp_path: Path) -> None:
    screens = []
    for rank in (0, 1):
        command = [sys.executable, "-c", ENDED_RANK, str(tmp_path), str(rank)]
        screens.append(subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout)
        assert f"step 7 of rank {rank}" in (tmp_path / "logs" / f"rank-{rank}.log").read_text()
    assert screens == ["step 7 of rank 0\n", ""]
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (row["step"], row["phase"], row["rl/loss"], row["rl/ratio"]) == (7, "1-1 RL", 0.5, None)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("rl/loss")] == [(7, 0.5)]


def test_progress_shows_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter("abc"), 3, "answers")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert list(progress(iter("abc"), 3, "answers")) == ["a", "b", "c"]
        monkeypatch.setenv("RANK", "1")
        assert list(progress(iter("abc"), 3, "answers")) == ["a", "b", "c"]
        terminal.write("end")
        terminal.flush()
        shown = ""
        while not shown.endswith("end"):  # a terminal hands over each write when it likes
            shown += os.read(ours, 10000).decode()
    os.close(ours)
    assert f"answers [{'#' * 30}] 3/3, 0 s left" in shown and shown.endswith("\r\x1b[Kend")
    assert shown.count("3/3") == 1
