"""What is kept in memory of prompts that may come again, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

from dppo_mcore.types import Prompt


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


class PlanCache:
    """Planned prompts (token ids and frame plans, nothing decoded) by request key, bounded in tokens."""

    def __init__(self, limit_tokens: int) -> None:
        self._limit = limit_tokens
        self._used = 0
        self._prompts: OrderedDict[Hashable, Prompt] = OrderedDict()

    def get(self, key: Hashable) -> Prompt | None:
        """The prompt of a key, now the most recently used; None where it isn't kept."""
        prompt = self._prompts.get(key)
        if prompt is not None:
            self._prompts.move_to_end(key)
        return prompt

    def put(self, key: Hashable, prompt: Prompt) -> None:
        """Keep a prompt; what alone exceeds the limit is not kept."""
        size = len(prompt.token_ids)
        if key in self._prompts or size > self._limit:
            return
        self._prompts[key] = prompt
        self._used += size
        while self._used > self._limit:
            _, oldest = self._prompts.popitem(last=False)
            self._used -= len(oldest.token_ids)
