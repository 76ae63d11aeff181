"""Imports go one way, and the check notices when they don't."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the import linter on the packages in `folder`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "kernels")])}
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--config", "pyproject.toml"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (None, ""),
        ("dppo_mcore/runtime/files.py", "from dppo_mcore.learn import step"),
        ("dppo_mcore/model/rope.py", "from dppo_mcore.data import packing"),
        ("dppo_mcore/rewards/exact.py", "import torch"),
        ("kernels/dppo_kernels/backend.py", "import dppo_mcore.types"),
    ],
)
def test_import_direction(tmp_path: Path, file: str | None, line: str) -> None:
    shutil.copytree(ROOT / "dppo_mcore", tmp_path / "dppo_mcore", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file is not None:
        planted = tmp_path / file
        planted.write_text(planted.read_text() + f"\n{line}\n")
    ended = lint(tmp_path)
    assert (ended.returncode == 0) == (file is None), ended.stdout + ended.stderr
