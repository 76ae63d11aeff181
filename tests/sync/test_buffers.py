"""Handles of memory on a GPU, each of which keeps the memory until it is opened: none is made in vain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dppo_mcore.sync.buffers import CudaBuffer
from dppo_mcore.sync.plan import RankPlace
from dppo_mcore.sync.push import WeightSync

ROOT = Path(__file__).resolve().parents[2]
LEADER = RankPlace(0, 0, "node-0")


class Lent:
    """A buffer that counts its handles."""

    def __init__(self) -> None:
        self.made = 0

    @property
    def handle(self) -> dict[str, Any]:
        """One more."""
        self.made += 1
        return {"nbytes": 4}


@pytest.mark.parametrize(
    ("others", "made"),
    [([], 0), ([RankPlace(1, 0, "node-1")], 0), ([RankPlace(0, 1, "node-0"), RankPlace(1, 0, "node-1")], 1)],
)
def test_only_ranks_of_the_node_get_a_handle(others: list[RankPlace], made: int) -> None:
    """A replica of one rank has nobody to open it, and ranks of other nodes can't."""
    sync, buffer = WeightSync.__new__(WeightSync), Lent()
    sync._places = [LEADER, *others]
    sync._replica = cast(Any, SimpleNamespace(broadcast=lambda value: value))
    handle = sync._handle(cast(Any, buffer))
    assert buffer.made == made and (handle is not None) == bool(made)


def test_a_buffer_has_one_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the ranks and the engine, bucket after bucket."""
    shared = []

    def share(storage: Any) -> tuple[Any, ...]:
        shared.append(storage)
        return (0, b"handle", 4, 0, b"counter", 0, b"event", False)

    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", share, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-0"))
    buffer = CudaBuffer.__new__(CudaBuffer)
    buffer.nbytes, buffer._tensor = 4, torch.zeros(4, dtype=torch.uint8)
    assert buffer.handle is buffer.handle and len(shared) == 1


def test_buffers_cross_processes_and_leave_nothing() -> None:
    """The same check that runs on a GPU, over shared memory."""
    command = [sys.executable, "tools/check_ipc.py", "--device", "cpu", "--rounds", "4", "--mib", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
