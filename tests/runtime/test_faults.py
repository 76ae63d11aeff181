"""One failing rank ends the job in seconds with one traceback; SIGTERM lets every rank save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


def launch(kind: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", "-m", "tests.runtime.failing_rank", kind, str(folder)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(folder: Path, names: list[str], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["import", "forward", "collective"])
def test_a_failing_rank_ends_the_job_with_one_traceback(tmp_path: Path, kind: str) -> None:
    job = launch(kind, tmp_path)
    wait_for(tmp_path, ["up-1"] if kind == "import" else ["up-0", "up-1"])
    began = time.monotonic()
    output, _ = job.communicate(timeout=90)
    took = time.monotonic() - began
    assert job.returncode != 0
    assert output.count("[rank 1] Traceback") == output.count("] Traceback (most") == 1, output
    assert took < 15
    if kind != "import":
        assert "[rank 1] Traceback" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_what_ends_every_rank_is_said_once(tmp_path: Path) -> None:
    output, _ = launch("import-everywhere", tmp_path).communicate(timeout=90)
    assert output.count("] Traceback (most") == 1, output


def test_ctrl_c_ends_a_rank_that_waits_in_a_collective(tmp_path: Path) -> None:
    job = launch("waiting", tmp_path)
    wait_for(tmp_path, ["up-0", "up-1"])
    time.sleep(1.0)
    (rank,) = (child for child in psutil.Process(job.pid).children() if child.environ().get("RANK") == "0")
    rank.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=60)
    assert output.count("interrupted") == 1 and "] Traceback (most" not in output, output


def test_a_rank_asked_to_stop_exits_with_0(tmp_path: Path) -> None:
    """The ranks are asked themselves: torchrun, which has a code of its own on a signal, then passes theirs on."""
    job = launch("wait", tmp_path)
    wait_for(tmp_path, ["up-0", "up-1"])
    for rank in psutil.Process(job.pid).children():
        if "RANK" in rank.environ():
            rank.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists(), output


def test_sigterm_lets_every_rank_save_and_says_how_to_resume(tmp_path: Path) -> None:
    job = launch("wait", tmp_path)
    wait_for(tmp_path, ["up-0", "up-1"])
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists(), output
    assert "resume with the same command" in output
    assert "planted" not in output
