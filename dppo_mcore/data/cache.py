"""Decoded patches kept in memory, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class PatchCache:
    """uint8 patches by plan key, bounded in bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._patches: OrderedDict[str, Tensor] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._patches

    def __len__(self) -> int:
        return len(self._patches)

    def get(self, key: str) -> Tensor | None:
        """Patches of a key, now the most recently used; None where they are not kept."""
        patches_PV = self._patches.get(key)
        if patches_PV is not None:
            self._patches.move_to_end(key)
        return patches_PV

    def put(self, key: str, patches_PV: Tensor) -> None:
        """Keep patches; what alone exceeds the limit is not kept."""
        size = patches_PV.numel()
        if key in self._patches or size > self._limit:
            return
        self._patches[key] = patches_PV
        self._used += size
        while self._used > self._limit:
            _, oldest = self._patches.popitem(last=False)
            self._used -= oldest.numel()
