"""How a gathered bucket reaches the engine: one class per transport, the same buffers and the same converter before.

Used on the leader only, between `open` and `close`. `load` returns once the buffer may be written again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

from dppo_mcore.rollout import weight_group
from dppo_mcore.rollout.base import TensorMeta, WeightReceiver
from dppo_mcore.rollout.wire import ALIGNMENT, Slot
from dppo_mcore.runtime import device
from dppo_mcore.sync.buffers import Buffer


class Transport(Protocol):
    """One way to the engine."""

    alignment: int
    """Bytes a tensor's start in the buffer is a multiple of."""

    def open(self, version: int) -> None:
        """Before the first bucket."""
        ...

    def load(self, slots: list[Slot], buffer: Buffer) -> None:
        """Hand one bucket over."""
        ...

    def close(self, version: int) -> None:
        """After the last one."""
        ...

    def stop(self) -> None:
        """Let go of what outlives a sync."""
        ...


class IpcTransport:
    """The engine maps the very buffer the ranks wrote: CUDA IPC, or shared memory on a CPU."""

    alignment = ALIGNMENT

    def __init__(self, receiver: WeightReceiver, source_dir: Path) -> None:
        self._receiver = receiver

    def open(self, version: int) -> None:
        """Nothing to prepare."""

    def load(self, slots: list[Slot], buffer: Buffer) -> None:
        """The engine copies out of the buffer."""
        handle = {**buffer.handle, "slots": [slot.to_json() for slot in slots]}
        self._receiver.load_shared(metas(slots), handle)

    def close(self, version: int) -> None:
        """Nothing to finish."""

    def stop(self) -> None:
        """Nothing held."""


class DistributedTransport:
    """One broadcast a bucket from the leader to the engine's ranks, over a group that lives as long as the engine."""

    alignment = 1

    def __init__(self, receiver: WeightReceiver, source_dir: Path) -> None:
        self._receiver = receiver
        self._group: Any = None

    def open(self, version: int) -> None:
        """Form the group the first time."""
        if self._group is None:
            self._group = self._receiver.join_group("127.0.0.1", weight_group.free_port(), device.backend())

    def load(self, slots: list[Slot], buffer: Buffer) -> None:
        """Broadcast exactly the bytes in use."""
        used = buffer.bytes()[: slots[-1].start + slots[-1].nbytes]
        self._receiver.load_broadcast(metas(slots), lambda: weight_group.broadcast(used, self._group))

    def close(self, version: int) -> None:
        """The group stays."""

    def stop(self) -> None:
        """Leave the group, on both sides as far as the engine still lives."""
        if self._group is not None:
            try:
                self._receiver.leave_group()
            except (OSError, ValueError):
                pass  # an engine that is gone has left
            weight_group.leave(self._group)
            self._group = None


class DiskTransport:
    """A Hugging Face directory that the engine reads and that is removed afterwards."""

    alignment = ALIGNMENT

    def __init__(self, receiver: WeightReceiver, source_dir: Path) -> None:
        self._receiver, self._source = receiver, source_dir
        self._folder: Path | None = None
        self._index: dict[str, str] = {}

    def open(self, version: int) -> None:
        """A new directory with the checkpoint's configuration."""
        self._folder, self._index = Path(tempfile.mkdtemp(prefix=f"dppo-weights-{version}-")), {}
        for name in ("config.json", "generation_config.json"):
            if (self._source / name).is_file():
                shutil.copyfile(self._source / name, self._folder / name)

    def load(self, slots: list[Slot], buffer: Buffer) -> None:
        """One safetensors file a bucket."""
        from safetensors.torch import save_file

        assert self._folder is not None
        flat = buffer.bytes()
        file = f"model-{len(list(self._folder.glob('*.safetensors'))):05d}.safetensors"
        save_file({slot.name: slot.view(flat) for slot in slots}, self._folder / file, metadata={"format": "pt"})
        self._index |= {slot.name: file for slot in slots}

    def close(self, version: int) -> None:
        """Name the files, let the engine load them."""
        assert self._folder is not None
        try:
            index = {"metadata": {}, "weight_map": self._index}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index))
            self._receiver.load_disk(str(self._folder), version)
        finally:
            self.stop()

    def stop(self) -> None:
        """Remove the directory."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


TRANSPORTS: dict[str, type[IpcTransport] | type[DistributedTransport] | type[DiskTransport]] = {
    "ipc": IpcTransport,
    "distributed": DistributedTransport,
    "disk": DiskTransport,
}


def metas(slots: list[Slot]) -> list[TensorMeta]:
    """Slots without their places."""
    return [TensorMeta(slot.name, slot.dtype, slot.shape) for slot in slots]
