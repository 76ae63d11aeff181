"""The method runs where there is no torch, no Megatron and no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import pkgutil, sys, importlib
import dppo_mcore.practice, dppo_mcore.rewards
for package in (dppo_mcore.practice, dppo_mcore.rewards):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
heavy = {"torch", "megatron", "transformers", "triton"} & set(sys.modules)
assert not heavy, heavy
"""


def test_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
