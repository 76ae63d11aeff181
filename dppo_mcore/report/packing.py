"""JSON that any browser reads, compressed and in blocks that the page opens one by one."""

from __future__ import annotations

import base64
import gzip
import json
import math
from typing import Any

BLOCK_CHARACTERS = 400_000
"""A block is closed when its JSON has so many: rollouts, teacher's and held-out answers alike."""
WRAPPING = 80
"""Bytes of the element that holds a block."""


def as_json(value: Any, ensure_ascii: bool = False) -> str:
    """Compact JSON. What JSON has no number for stands as its name: "NaN", "Infinity" or "-Infinity"."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_named(value), ensure_ascii=ensure_ascii, separators=(",", ":"), allow_nan=False)


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_named(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def compress(text: str) -> str:
    """gzip, base64."""
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode("ascii")


def pack(value: Any) -> str:
    """A value as the page unpacks it."""
    return compress(as_json(value))


class Packer:
    """Fills blocks within so many bytes of the file; what comes when they are used up has no block."""

    def __init__(self, room: float) -> None:
        self.blocks: list[str] = []
        self.number: dict[int, int] = {}
        """Number of the block that holds an item."""
        self.full = False
        self._left = room
        self._open: list[tuple[int, str]] = []
        self._weight = 0

    def add(self, key: int, value: Any) -> None:
        """Take in one item."""
        text = as_json(value)
        self._open.append((key, text))
        self._weight += len(text)
        if self._weight >= BLOCK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Close the block being filled."""
        items, self._open, self._weight = self._open, [], 0
        if items and not self.full:
            self._store(items)

    def _store(self, items: list[tuple[int, str]]) -> None:
        """One block of them; of the first ones that are too large for what is left, as many as fit."""
        block = compress("{" + ",".join(f'"{key}":{text}' for key, text in items) + "}")
        if len(block) + WRAPPING <= self._left:
            self.number |= {key: len(self.blocks) for key, _ in items}
            self.blocks.append(block)
            self._left -= len(block) + WRAPPING
            return
        self.full = True
        if len(items) > 1:
            self._store(items[: len(items) // 2])
            self._store(items[len(items) // 2 :])
