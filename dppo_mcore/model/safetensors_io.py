"""Checkpoint folders of safetensors files: memory-mapped slices in, a stream of tensors out.

Files are mapped, never read whole: a slice costs the pages it touches, and none of them is anonymous memory.
Writing fixes every file's header first (names, shapes and types are known) and then appends tensors one by one.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dppo_mcore.runtime.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


class CheckpointError(UserError):
    """A checkpoint folder that can't be read; the message names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: byte range [start, end) of a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass
class CheckpointReader:
    """The tensors of a checkpoint folder, as read-only views of its mapped files."""

    folder: Path
    tensors: dict[str, StoredTensor] = field(init=False)
    bytes_requested: int = field(init=False, default=0)
    """Bytes of all slices handed out so far."""

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._maps: dict[Path, mmap.mmap] = {}
        self.tensors = {}
        listed = _listed_files(self.folder)
        for file, names in listed.items():
            header = read_header(file)
            for name in names if names is not None else header:
                if name not in header:
                    raise CheckpointError(f"{self.folder / INDEX} puts {name} in {file.name}, which doesn't hold it")
                self.tensors[name] = header[name]

    def view(self, name: str) -> Tensor:
        """The whole tensor as a view of the mapped file; counts nothing, touches no page."""
        stored = self.tensors[name]
        if stored.end == stored.start:
            return torch.empty(stored.shape, dtype=stored.dtype)
        flat = torch.frombuffer(
            self._map(stored.file), dtype=stored.dtype, count=prod(stored.shape), offset=stored.start
        )
        return flat.view(stored.shape)

    def narrow(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """A slice of a tensor as a view of the mapped file."""
        part = self.view(name).narrow(dim, start, length)
        self.bytes_requested += part.numel() * part.element_size()
        return part

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                # Private and writable only so that torch accepts the buffer; nobody writes to it.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def _listed_files(folder: Path) -> dict[Path, list[str] | None]:
    """Files of a checkpoint with the keys the index puts there (None: all of the file's)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; --model wants a Hugging Face checkpoint folder")
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} can't be read: {error!r}") from None
        files: dict[Path, list[str] | None] = {}
        for name, file in places.items():
            files.setdefault(folder / file, []).append(name)  # type: ignore[union-attr]
        return files
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{folder} holds no *.safetensors file; convert the checkpoint to safetensors first")
    return {file: None for file in found}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Names and places of a safetensors file's tensors; a file that is cut short is an error."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > size - 8:
                raise CheckpointError(f"{file} is damaged: its header is longer than the file")
            header = json.loads(handle.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; the checkpoint's index names it") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged: its header is no JSON") from None
    base, tensors = 8 + length, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: {name} has type {entry['dtype']}; one of {', '.join(DTYPES)} is wanted")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = (base + offset for offset in entry["data_offsets"])
        if end > size:
            raise CheckpointError(f"{file} is cut short: {name} ends at byte {end}, the file at {size}")
        if end - start != prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{file} is damaged: {name} of shape {list(shape)} takes {end - start} bytes")
        tensors[name] = StoredTensor(file, dtype, shape, start, end)
    return tensors


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def plan_files(specs: Iterable[TensorSpec], max_bytes: int) -> dict[str, list[TensorSpec]]:
    """Cut the tensors, in order, into files of at most `max_bytes` (a larger tensor has a file of its own)."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def write_checkpoint(folder: Path, files: dict[str, list[TensorSpec]], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write the planned files from a stream of (name, tensor) in the plan's order, one tensor in memory at a time."""
    for file, specs in files.items():
        with (folder / file).open("wb") as handle:
            handle.write(_header(specs))
            for spec in specs:
                name, tensor = next(tensors)
                if (name, tuple(tensor.shape), tensor.dtype) != (spec.name, spec.shape, spec.dtype):
                    raise CheckpointError(f"{folder / file}: got {name} where {spec} was planned")
                raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                handle.write(memoryview(raw.numpy()))
            handle.flush()
            os.fsync(handle.fileno())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for specs in files.values() for spec in specs)},
            "weight_map": {spec.name: file for file, specs in files.items() for spec in specs},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(specs: list[TensorSpec]) -> bytes:
    """The length-prefixed JSON header, padded so that the data start on an 8-byte border."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
