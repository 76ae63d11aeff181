"""Every kernel compiles for Hopper ahead of time: no spills, tensor cores where a product is, nothing specialised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MAX_SHARED = 227 * 1024


def test_machine_code_for_hopper() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_sm90.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) >= 20
    for name, found in kernels.items():
        assert found["target"] == "sm_90a", name
        assert found["spills"] == found["stack"] == found["local"] == 0, (name, found)
        assert found["registers"] <= 255 and found["shared"] <= MAX_SHARED, (name, found)
        assert (found["hgmma"] > 0) == name.startswith("fused_kernel"), (name, found)
        assert set(found["specialised"]) <= {"pitch", "out_pitch"}, (name, found["specialised"])
        assert not found["autotuned"], name
