"""Gives the device back between phases: weights, gradients and optimizer state wait in pinned host memory.

Communicators of data-parallel groups, which nothing uses meanwhile, give their buffers back too where the library can
(torch >= 2.13 over NCCL >= 2.29.7). Tensor- and pipeline-parallel ones stay: clips are encoded for an engine over them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dppo_mcore.learn.state import Learner
from dppo_mcore.runtime import device


@dataclass(frozen=True)
class Stage:
    """One stage of an offload or reload."""

    name: str
    bytes: int
    seconds: float
    device_bytes_after: int
    """Device memory still held by tensors."""


@dataclass
class Offloader:
    """Moves a learner's storages off the device and back; a second call in the same state does nothing."""

    state: Learner
    stages: list[Stage] = field(default_factory=list)
    _held: list[tuple[Tensor, Tensor, int]] = field(default_factory=list, repr=False)
    """(device tensor whose storage was freed, host copy, its bytes)."""
    _zeroed: list[tuple[Tensor, int]] = field(default_factory=list, repr=False)
    """Gradient buffers, whose contents need no copy."""
    _pinned: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """Host copies by their place in the order of moving, used again next time."""

    _suspended: list[Any] = field(default_factory=list, repr=False)
    """Backends whose communicators are suspended."""

    @property
    def offloaded(self) -> bool:
        """Whether the learner is on the host now."""
        return bool(self._held or self._zeroed)

    def offload(self, keep_weights: bool = False) -> list[Stage]:
        """Free gradients, optimizer state and, unless a colocated engine shares them, weights."""
        if self.offloaded:
            return []
        self.stages = []
        with self._stage("gradients") as moved:
            for chunk in self.state.chunks:
                for buffer in chunk.buffers:
                    moved.append(self._free(buffer.grad_data))
        with self._stage("optimizer") as moved:
            for tensor in self.state.optimizer.host_movable():
                moved.append(self._to_host(tensor))
        if not keep_weights:
            with self._stage("weights") as moved:
                for tensor in self._weights():
                    moved.append(self._to_host(tensor))
        with self._stage("communicators") as moved:
            moved.append(self._suspend())
        device.empty_cache()
        return self.stages

    def reload(self) -> list[Stage]:
        """Bring everything back, bit for bit; gradient buffers come back zeroed."""
        self.stages = []
        with self._stage("reload") as moved:
            for backend in self._suspended:
                backend.resume()
            self._suspended = []
            for tensor, host, size in reversed(self._held):
                tensor.untyped_storage().resize_(size)
                tensor.copy_(host, non_blocking=True)
                moved.append(size)
            for buffer, size in self._zeroed:
                buffer.untyped_storage().resize_(size)
                buffer.zero_()
                moved.append(size)
        self._held, self._zeroed = [], []
        return self.stages

    def _weights(self) -> list[Tensor]:
        """One tensor per storage: the flat buffers that trainable parameters view, and frozen parameters."""
        tensors: dict[int, Tensor] = {}
        for chunk in self.state.chunks:
            for buffer in chunk.buffers:
                if buffer.param_data is not None:
                    tensors[buffer.param_data.untyped_storage().data_ptr()] = buffer.param_data
            for parameter in chunk.module.parameters():
                tensors.setdefault(parameter.untyped_storage().data_ptr(), parameter.data)
        return list(tensors.values())

    def _to_host(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
        if size == 0 or any(held.untyped_storage()._cdata == storage._cdata for held, _, _ in self._held):
            return 0
        slot = len(self._held)
        host = self._pinned.get(slot)
        if host is None or host.numel() != whole.numel() or host.dtype != whole.dtype:
            host = self._pinned[slot] = device.pin(whole)
        else:
            host.copy_(whole, non_blocking=True)
            device.synchronize()
        self._held.append((whole, host, size))
        storage.resize_(0)
        return size

    def _suspend(self) -> int:
        """Bytes that data-parallel communicators gave back. All ranks come here at the same point."""
        free = device.memory_free()
        for group in _data_parallel_groups():
            backend = group._get_backend(device.device())
            try:
                backend.suspend()
            except (AttributeError, RuntimeError) as error:
                self.state.log.debug("communicators keep their buffers: %s", str(error).splitlines()[0])
                continue
            self._suspended.append(backend)
        return max(0, device.memory_free() - free)

    def _free(self, buffer: Tensor) -> int:
        size = buffer.untyped_storage().nbytes()
        whole = torch.empty(0, dtype=buffer.dtype, device=buffer.device).set_(buffer.untyped_storage())
        self._zeroed.append((whole, size))
        buffer.untyped_storage().resize_(0)
        return size

    @contextmanager
    def _stage(self, name: str) -> Iterator[list[int]]:
        started, moved = time.perf_counter(), []
        yield moved
        device.synchronize()
        self.stages.append(Stage(name, sum(moved), time.perf_counter() - started, device.memory_allocated()))


def _data_parallel_groups() -> list[dist.ProcessGroup]:
    """Groups that only training uses; those of one rank communicate nothing."""
    groups = [parallel_state.get_data_parallel_group(with_context_parallel=context) for context in (False, True)]
    return [group for number, group in enumerate(groups) if group.size() > 1 and group not in groups[:number]]
