"""The wire between a trainer rank and the engine's process: JSON messages on a local socket, tensors in shared memory.

A message is a 4-byte big-endian length and that many bytes of JSON. Tensors never go through it: the sender puts them
into an anonymous memory file and names it by `/proc/PID/fd/N`, which any process of the same user on the same node can
map. Nothing stays behind in /dev/shm whoever dies, and /dev/shm's size is no limit.
Runs in the engine's environment too: torch and the standard library only.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_MESSAGE = 1 << 30
ALIGNMENT = 64


class WireError(ConnectionError):
    """The other side went away or sent something else than a message."""


def encode(message: Mapping[str, Any]) -> bytes:
    """Message with its length in front."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return struct.pack(">I", len(body)) + body


def body_length(head: bytes) -> int:
    """Length of the body that follows a 4-byte head."""
    (length,) = struct.unpack(">I", head)
    if length > MAX_MESSAGE:
        raise WireError(f"a message of {length} bytes is no message of this protocol")
    return length


def receive(connection: socket.socket) -> dict[str, Any]:
    """Read one message; `WireError` when the other side is gone."""
    return json.loads(_read(connection, body_length(_read(connection, 4))))


def _read(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise WireError("the other side closed the connection")
        parts += part
    return bytes(parts)


class SharedBuffer:
    """Anonymous shared memory of this process; freed when it and every mapping of it are gone."""

    _serials = itertools.count()

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._serial = next(self._serials)
        self._descriptor = os.memfd_create("dppo", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, max(nbytes, 1))
        self._mapping: mmap.mmap | None = mmap.mmap(self._descriptor, max(nbytes, 1))

    @property
    def handle(self) -> dict[str, Any]:
        """What another process needs to map it; `serial` tells buffers apart that reuse a descriptor."""
        return {"path": f"/proc/{os.getpid()}/fd/{self._descriptor}", "nbytes": self.nbytes, "serial": self._serial}

    def bytes(self) -> Tensor:
        """The memory as uint8 [nbytes]."""
        if self._mapping is None:
            raise WireError("shared buffer is closed")
        return torch.frombuffer(self._mapping, dtype=torch.uint8)[: self.nbytes]

    def close(self) -> None:
        """Drop this process's hold on it; harmless twice."""
        if self._mapping is not None:
            os.close(self._descriptor)
            self._mapping = None


def attach(handle: Mapping[str, Any]) -> Tensor:
    """Map another process's buffer: uint8 [nbytes], unmapped when the last view of it goes."""
    descriptor = os.open(handle["path"], os.O_RDWR | os.O_CLOEXEC)
    try:
        mapping = mmap.mmap(descriptor, max(handle["nbytes"], 1))
    finally:
        os.close(descriptor)
    return torch.frombuffer(mapping, dtype=torch.uint8)[: handle["nbytes"]]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in a flat buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize

    def view(self, flat: Tensor) -> Tensor:
        """The tensor inside `flat`, uint8."""
        return flat[self.start : self.start + self.nbytes].view(torch_dtype(self.dtype)).view(self.shape)

    def to_json(self) -> list[Any]:
        """As a JSON value."""
        return [self.name, self.dtype, list(self.shape), self.start]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Slot:
        """Back from `to_json`."""
        return cls(value[0], value[1], tuple(value[2]), value[3])


def lay_out(tensors: Sequence[tuple[str, str, tuple[int, ...]]], alignment: int = ALIGNMENT) -> tuple[list[Slot], int]:
    """Slots for (name, dtype, shape) in order, each aligned, and the bytes they take."""
    slots, offset = [], 0
    for name, dtype, shape in tensors:
        slot = Slot(name, dtype, tuple(shape), offset)
        slots.append(slot)
        offset += -(-slot.nbytes // alignment) * alignment
    return slots, offset


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16."""
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def share(tensors: Mapping[str, Tensor]) -> tuple[SharedBuffer, dict[str, Any]]:
    """Copy tensors into one new buffer; the handle carries their slots, for `attach_all`."""
    slots, nbytes = lay_out([(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()])
    buffer = SharedBuffer(nbytes)
    flat = buffer.bytes()
    for slot in slots:
        slot.view(flat).copy_(tensors[slot.name])
    return buffer, {**buffer.handle, "slots": [slot.to_json() for slot in slots]}


def attach_all(handle: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a `share` handle, by name, as views of the shared memory."""
    flat = attach(handle)
    return {slot.name: slot.view(flat) for slot in map(Slot.from_json, handle["slots"])}
