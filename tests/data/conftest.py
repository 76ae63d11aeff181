"""Fixtures of the data tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_mcore.config import DataConfig
from dppo_mcore.data.qwen import Processor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def oracle(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], list[Any]]:
    """Hugging Face's processors as a function from cases to answers, each call one process."""

    def ask(cases: list[dict[str, Any]]) -> list[Any]:
        folder = tmp_path_factory.mktemp("oracle")
        torch.save(cases, folder / "cases.pt")
        environment = dict(os.environ, PYTHONPATH=str(ROOT / "tests" / "sglang_shims"), OMP_NUM_THREADS="1")
        script = [str(ROOT / "tests" / "data" / "hf_oracle.py"), tiny_dir, "cases.pt", "answers.pt"]
        python = str(ROOT / ".venv-sglang" / "bin" / "python")
        done = subprocess.run([python, *script], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.load(folder / "answers.pt", weights_only=False)

    return ask


@pytest.fixture(scope="session")
def processor(tiny_dir: str) -> Processor:
    """Processor of the tiny checkpoint with small clips in mind."""
    return Processor(tiny_dir, DataConfig(data_workers=0))
