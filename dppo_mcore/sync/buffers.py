"""Flat memory a bucket is gathered in: made by the leader, written by all ranks of its node, read by the engine."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from dppo_mcore.rollout import wire


class Buffer(Protocol):
    """Memory that other processes of the node can map by its handle."""

    nbytes: int

    @property
    def handle(self) -> dict[str, Any]:
        """How to map it, as JSON."""
        ...

    def bytes(self) -> Tensor:
        """uint8 [nbytes]."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class CudaBuffer:
    """Device memory, shared by CUDA IPC."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._tensor: Tensor | None = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    @cached_property
    def handle(self) -> dict[str, Any]:
        """CUDA IPC handle and the device's UUID, made once: each one keeps the memory until somebody has opened it."""
        storage = list(self.bytes().untyped_storage()._share_cuda_())
        for position in (1, 4, 6):
            storage[position] = base64.b64encode(storage[position]).decode()
        uuid = str(torch.cuda.get_device_properties(self.bytes().device).uuid)
        return {"cuda": {"uuid": uuid, "storage": storage}, "nbytes": self.nbytes}

    def bytes(self) -> Tensor:
        """uint8 [nbytes] on the device."""
        assert self._tensor is not None, "buffer is closed"
        return self._tensor

    def close(self) -> None:
        """Free it."""
        self._tensor = None


MAKE: dict[str, Callable[[int], Buffer]] = {"cpu": wire.SharedBuffer, "cuda": CudaBuffer}


def attach(handle: Mapping[str, Any]) -> Tensor:
    """Another rank's buffer, uint8 [nbytes]."""
    if "cuda" not in handle:
        return wire.attach(handle)
    from dppo_mcore.rollout.engine_loader import cuda_buffer

    return cuda_buffer(handle)


class Buffers:
    """At most two buffers of a bucket's size, reused, and one larger one at a time for a tensor that needs it."""

    def __init__(self, kind: str, bucket_bytes: int, count: int) -> None:
        self._kind, self._size = kind, bucket_bytes
        self._free: list[Buffer] = []
        self._allowed = count
        self._large = False
        self.peak = 0
        self._held = 0

    def take(self, nbytes: int) -> Buffer | None:
        """A buffer of at least `nbytes`; None while all that may exist are in use."""
        if nbytes > self._size:
            if self._large:
                return None
            return self._make(nbytes)
        if self._free:
            return self._free.pop()
        if self._allowed == 0:
            return None
        self._allowed -= 1
        return self._make(self._size)

    def give(self, buffer: Buffer) -> None:
        """Done with it."""
        if buffer.nbytes > self._size:
            self._large = False
            self._held -= buffer.nbytes
            buffer.close()
        else:
            self._free.append(buffer)

    def close(self) -> None:
        """Free all that were given back."""
        for buffer in self._free:
            buffer.close()
        self._free = []

    def _make(self, nbytes: int) -> Buffer:
        self._large = self._large or nbytes > self._size
        self._held += nbytes
        self.peak = max(self.peak, self._held)
        return MAKE[self._kind](nbytes)
