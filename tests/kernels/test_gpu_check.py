"""The GPU check's own machinery: bare machines, time limits, one line where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch

ABSENT = ("pytest", "transformers", "megatron", "sglang", "scipy", "dppo_mcore")
BARE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.path.insert(0, "tools")
sys.argv = ["bare_pytest.py", "--jobs", "150", "--part", "0", *{gpu_check.KERNEL_TESTS!r}]
runpy.run_path("tools/bare_pytest.py", run_name="__main__")
"""


def test_kernel_tests_run_with_torch_and_triton_alone() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], cwd=gpu_check.ROOT, env=os.environ.copy(),
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for path in gpu_check.KERNEL_TESTS:
        assert f"{path}: 1 passed" in done.stdout or f"{path}: 2 passed" in done.stdout, done.stdout


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "tools/gpu_check.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout.startswith("gpu_check: no CUDA device here")


def test_a_step_that_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
    child = "import sys, time; open(sys.argv[1], 'a').write('started'); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, *sys.argv[1:]])"
    sign = tmp_path / "sign"
    step = gpu_check.Step("slow", ("{python}", "-c", parent, str(sign)), seconds=10, needs=())
    ended = gpu_check.run(step, tmp_path, 100.0)
    assert sign.read_text() == "started"
    assert ended["result"] == "stopped after 10 s"
    deadline = time.monotonic() + 10
    while _running(str(sign)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _running(str(sign))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    step = gpu_check.Step("odd", ("true",), 20, needs=("torch", "no_such_module"))
    assert gpu_check.run(step, tmp_path, 100.0)["result"] == "skipped: no no_such_module"
    step = gpu_check.Step("odd", ("no-such-program",), 20, needs=())
    assert gpu_check.run(step, tmp_path, 100.0)["result"] == "skipped: no no-such-program"


def _running(word: str) -> bool:
    """Whether a process with this word in its command line lives."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_bytes().decode(errors="replace"):
                return True
        except OSError:
            continue
    return False
