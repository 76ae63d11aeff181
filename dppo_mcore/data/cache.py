"""What is kept in memory of prompts that may come again, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Values by key, the sum of their sizes bounded: patches in bytes, planned prompts in tokens."""

    def __init__(self, limit: int, size_of: Callable[[Value], int]) -> None:
        self._limit = limit
        self._size_of = size_of
        self._used = 0
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """The value of a key, now the most recently used; None where it isn't kept."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: Value) -> None:
        """Keep a value; what alone exceeds the limit is not kept."""
        size = self._size_of(value)
        if key in self._values or size > self._limit:
            return
        self._values[key] = value
        self._used += size
        while self._used > self._limit:
            _, oldest = self._values.popitem(last=False)
            self._used -= self._size_of(oldest)
