"""Messages and shared memory between processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dppo_mcore.rollout import wire

ROOT = Path(__file__).resolve().parents[2]


def test_a_message_arrives_whole() -> None:
    """Also one larger than a socket's buffer, sent by another thread."""
    import threading

    left, right = socket.socketpair()
    message = {"op": "x", "ids": list(range(100_000))}
    sender = threading.Thread(target=left.sendall, args=(wire.encode(message),))
    sender.start()
    assert wire.receive(right) == message
    sender.join()
    left.close()
    with pytest.raises(wire.WireError, match="closed"):
        wire.receive(right)
    right.close()


def test_what_is_no_message_is_refused() -> None:
    """A length beyond all sense."""
    with pytest.raises(wire.WireError, match="no message"):
        wire.body_length(b"\xff\xff\xff\xff")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_cross_processes(dtype: torch.dtype) -> None:
    """Another process maps, reads and writes them; nothing of it lies in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.ones(5, dtype=torch.float32)}
    buffer, handle = wire.share(tensors)
    code = (
        "import json, sys\nfrom dppo_mcore.rollout import wire\n"
        "found = wire.attach_all(json.loads(sys.argv[1]))\n"
        "assert found['b'].sum() == 5\nfound['a'] += 1\n"
    )
    import json

    subprocess.run([sys.executable, "-c", code, json.dumps(handle)], check=True, cwd=ROOT)
    assert torch.equal(wire.attach_all(handle)["a"], tensors["a"] + 1)
    buffer.close()
    buffer.close()
    with pytest.raises(OSError):
        wire.attach(handle)
    assert set(os.listdir("/dev/shm")) == before


def test_mappings_outlive_the_owner_and_leak_nothing() -> None:
    """A mapped tensor stays readable after close; descriptors return to where they were."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        buffer, handle = wire.share({"a": torch.full((1000,), 3.0)})
        view = wire.attach_all(handle)["a"]
        buffer.close()
        assert view.sum() == 3000
        del view
    assert len(os.listdir("/proc/self/fd")) <= before


def test_slots_are_aligned_and_apart() -> None:
    """Each starts on a multiple of the alignment, none overlaps."""
    slots, nbytes = wire.lay_out([("a", "bfloat16", (3,)), ("b", "float32", (2, 2)), ("c", "float32", (0, 4))])
    assert [slot.start for slot in slots] == [0, 64, 128]
    assert nbytes == 128
