"""Mistakes and mishaps: one clear line, no half-written file."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_mcore.runtime import faults
from dppo_mcore.runtime.errors import UserError
from dppo_mcore.runtime.files import replacing
from dppo_mcore.runtime.metric_names import unit_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    with pytest.raises(OSError), replacing(target) as file:
        file.write("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with replacing(target) as file:
        file.write("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as file:
        file.write("half of the new")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_known_mishaps_are_one_line() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/runs/x/metrics.jsonl")
    assert faults._known_error(full) == "no space left on device while writing /runs/x/metrics.jsonl"
    sqlite, safetensors = Exception("database or disk is full"), Exception("I/O error: No space left on device (os 28)")
    assert all("no space left" in (faults._known_error(error) or "") for error in (sqlite, safetensors))
    assert faults._known_error(UserError("data: a manifest is needed")) == "data: a manifest is needed"
    assert faults._known_error(ValueError("a bug")) is None


def run_rank(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **variables}
    command = [sys.executable, "-W", "ignore", "-m", "tests.runtime.failing_rank", "wait", str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = run_rank(tmp_path, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert ended.returncode == 1
    assert f"error: port {port} is in use; choose another with torchrun --master-port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_undeclared_metric_is_an_error() -> None:
    assert unit_of("rl/success/counting") == "share of an objective's samples"
    with pytest.raises(KeyError, match="metric_names"):
        unit_of("rl/sucess")


def test_doctor_says_what_is_there_and_fails_without_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dppo_mcore.doctor", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0 and '"can_train": true' in found.stdout
    for finding in json.loads(found.stdout)["findings"]:
        assert finding["state"] == "ok" or (finding["cost"] and finding["remedy"]), finding
    for name in ("av", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is gone')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    broken = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert broken.returncode == 1, broken.stderr
    states = {finding["name"]: finding for finding in json.loads(broken.stdout)["findings"]}
    assert not json.loads(broken.stdout)["can_train"]
    for name in ("av", "torch"):
        assert states[name]["state"] == "broken" and f"{name} is gone" in states[name]["detail"]
    assert states["gpu"]["state"] == states["nccl"]["state"] == "missing"
