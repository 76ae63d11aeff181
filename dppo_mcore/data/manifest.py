"""A manifest of millions of rows with random access in constant memory.

The first opening validates every row and writes an index (offsets, hashed ids, objective and dimension codes) beside
the manifest; later openings map that index and read rows on demand.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from dppo_mcore.data.errors import DataError
from dppo_mcore.data.schema import parse_row
from dppo_mcore.types import Sample

INDEX_VERSION = 4
LABELS = ("objective", "dimension", "source")
RECENT = 4096
"""Samples that `get` remembers."""
BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n,]*")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that was not taken."""

    file: str
    line: int
    """Line of a JSONL file, or number of the element of a JSON array, from 1."""
    reason: str
    media: str = ""
    """The offending medium's path as written, where the reason is its path."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def read_manifest(path: str | os.PathLike[str], media_root: str | os.PathLike[str] = "", name: str = "") -> Manifest:
    """Open a JSONL or JSON manifest. Media paths are relative to `media_root`, or to the manifest's folder.

    `name` is what the ids of rows without one begin with; empty is the file's stem.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise DataError(f"{path}: no such manifest")
    root = os.path.normpath(os.path.abspath(media_root or path.parent))
    name = name or path.stem
    return Manifest(path, root, name, _load_index(path, root, name))


class Manifest(Sequence[Sample]):
    """The valid rows of a manifest file, in file order. `refused` tells the others, with their reasons."""

    def __init__(self, path: Path, root: str, name: str, folder: Path) -> None:
        self.path = path
        self.root = root
        self.name = name
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self._lines = np.load(folder / "lines.npy", mmap_mode="r")
        self._hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self._order = np.load(folder / "order.npy", mmap_mode="r")
        self._codes = np.load(folder / "codes.npy", mmap_mode="r")
        header = json.loads((folder / "header.json").read_text())
        self._names: dict[str, list[str]] = header["names"]
        self.refused = tuple(Refusal(str(path), *row) for row in header["refused"])
        self._file: BinaryIO | None = None
        self._recent: OrderedDict[str, Sample] = OrderedDict()

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = _parse(self._read(index))
        return parse_row(row, self.root, f"{self.name}:{int(self._lines[index])}")

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def index_of(self, sample_id: str) -> int:
        """Row number of an id; KeyError when there is none."""
        return self._find(sample_id)[0]

    def get(self, sample_id: str) -> Sample:
        """The sample of an id, remembered for a while; KeyError when there is none."""
        sample = self._recent.get(sample_id)
        if sample is None:
            sample = self._recent[sample_id] = self._find(sample_id)[1]
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        return sample

    def shared(self, other: Manifest) -> Iterator[tuple[Sample, Sample]]:
        """This one's sample and the other's, for every id that both have; other rows aren't read."""
        for hashed in np.intersect1d(self._hashes, other._hashes):
            mine = {sample.id: sample for _, sample in self._hashed(hashed)}
            yield from ((mine[sample.id], sample) for _, sample in other._hashed(hashed) if sample.id in mine)

    def _find(self, sample_id: str) -> tuple[int, Sample]:
        for index, sample in self._hashed(_hash(sample_id)):
            if sample.id == sample_id:
                return index, sample
        raise KeyError(sample_id)

    def _hashed(self, wanted: np.uint64) -> Iterator[tuple[int, Sample]]:
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self) and self._hashes[at] == wanted:
            index = int(self._order[at])
            yield index, self[index]
            at += 1

    def label(self, index: int, name: str) -> str:
        """`objective`, `dimension` or `source` of a row, without reading it."""
        return self._names[name][int(self._codes[index, LABELS.index(name)])]

    def counts(self, name: str, first: int | None = None) -> dict[str, int]:
        """Rows per value of `objective`, `dimension` or `source`, among all rows or the first so many."""
        column = np.bincount(self._codes[:first, LABELS.index(name)], minlength=len(self._names[name]))
        return {value: int(count) for value, count in zip(self._names[name], column, strict=True)}

    def _read(self, index: int) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115
        start, length = (int(value) for value in self._offsets[index])
        return os.pread(self._file.fileno(), length, start)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_recent": OrderedDict()}


def _hash(text: str) -> np.uint64:
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint64)[0]


def _stamp(path: Path, root: str) -> list[Any]:
    stat = path.stat()
    return [INDEX_VERSION, stat.st_size, stat.st_mtime_ns, root]


def _load_index(path: Path, root: str, name: str) -> Path:
    """Folder of an index that fits the manifest; built where there is none. It holds ids, so a name has its own."""
    what = [str(path), root] if name == path.stem else [str(path), root, name]
    key = hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
    places = [
        path.parent / f".{path.name}.index-{key}",
        Path(tempfile.gettempdir()) / f"dppo-index-{os.getuid()}-{key}",
    ]
    for folder in places:
        try:
            with _locked(folder):
                return folder if _fits(folder, path, root) else _build_index(folder, path, root, name)
        except OSError as error:
            failure = error
    raise DataError(f"{path}: its index can be written neither beside it nor in the temporary folder ({failure})")


def _fits(folder: Path, path: Path, root: str) -> bool:
    header = folder / "header.json"
    return header.is_file() and json.loads(header.read_text())["stamp"] == _stamp(path, root)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Of many ranks that start together one indexes and the others wait for it. A complete index needs no lock."""
    try:
        lock = open(folder.with_name(folder.name + ".lock"), "w")  # noqa: SIM115
    except OSError:
        if folder.is_dir():
            yield
            return
        raise
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_index(folder: Path, path: Path, root: str, name: str) -> Path:
    stamp = _stamp(path, root)
    arrays, names, refused = _scan(path, root, name)
    return _write_index(folder, arrays, {"stamp": stamp, "names": names, "refused": refused})


def _write_index(folder: Path, arrays: dict[str, np.ndarray], header: dict[str, Any]) -> Path:
    """Written aside and renamed, so that ranks that index at the same time don't see halves of it."""
    aside = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    for name, values in arrays.items():
        np.save(aside / f"{name}.npy", values)
    (aside / "header.json").write_text(json.dumps(header))
    folder.mkdir(exist_ok=True)
    for name in (*(f"{name}.npy" for name in arrays), "header.json"):
        os.replace(aside / name, folder / name)
    aside.rmdir()
    return folder


def _scan(path: Path, root: str, name: str) -> tuple[dict[str, np.ndarray], dict[str, list[str]], list[list[Any]]]:
    """Validate every row; rows with an id seen before are refused too."""
    offsets, lines, hashes, codes = array("q"), array("q"), array("Q"), array("i")
    names: dict[str, dict[str, int]] = {label: {} for label in LABELS}
    refused: list[list[Any]] = []
    first_line: dict[int, int] = {}
    for line, start, raw in _rows(path):
        try:
            sample = parse_row(_parse(raw), root, f"{name}:{line}")
            hashed = int(_hash(sample.id))
            if hashed in first_line:
                raise DataError(f"id {sample.id!r} is taken by line {first_line[hashed]}")
        except DataError as error:
            refused.append([line, str(error), _named_medium(str(error))])
        else:
            first_line[hashed] = line
            offsets.extend((start, len(raw)))
            lines.append(line)
            hashes.append(hashed)
            codes.extend(names[label].setdefault(getattr(sample, label), len(names[label])) for label in LABELS)
    keys = np.frombuffer(hashes, np.uint64)
    order = np.argsort(keys, kind="stable")
    arrays: dict[str, np.ndarray] = {
        "offsets": np.frombuffer(offsets, np.int64).reshape(-1, 2),
        "lines": np.frombuffer(lines, np.int64),
        "hashes": keys[order],
        "order": order.astype(np.int32),
        "codes": np.frombuffer(codes, np.int32).reshape(-1, len(LABELS)),
    }
    return arrays, {label: list(values) for label, values in names.items()}, refused


def _parse(raw: bytes) -> Any:
    """A row's JSON value, all of its text fit for UTF-8."""
    try:
        row = json.loads(raw)
        if b"\\u" in raw:
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else str(error)
        raise DataError(f"not JSON: {reason}") from error
    return row


def _named_medium(reason: str) -> str:
    return reason.split("'")[1] if reason.startswith("media path '") else ""


def _rows(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line or element number from 1, byte offset, bytes) of every row."""
    with open(path, "rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if head[:1] != b"[":
            file.seek(0)
            start = 0
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    yield line, start, raw
                start += len(raw)
            return
    yield from _elements(path)


def _elements(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Rows of one JSON array. Bytes that are no UTF-8 are carried along, to be refused with their row."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    # Only the elements' ends are wanted here; Python refuses to turn very long digits into a number.
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)
    at = text.index("[") + 1
    start, number = len(text[:at].encode("utf-8", "surrogateescape")), 0
    while True:
        skipped = BETWEEN_ELEMENTS.match(text, at)
        assert skipped is not None
        start += skipped.end() - at
        at = skipped.end()
        if text[at : at + 1] == "]" and not text[at + 1 :].strip():
            return
        number += 1
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: element {number} is not JSON ({error}); nothing after it can be read") from error
        raw = text[at:end].encode("utf-8", "surrogateescape")
        yield number, start, raw
        start += len(raw)
        at = end
