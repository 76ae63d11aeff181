"""Work spread evenly: over data-parallel ranks, and over the rows of one rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balance(costs: Sequence[float], ranks: int, equal: bool = False) -> list[list[int]]:
    """Item numbers per rank, largest item first to the least loaded rank; the same on every rank.

    With `equal` every rank gets as many items (as far as that divides), which engines like. Items of a rank stand in
    their original order.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    share, over = divmod(len(costs), ranks)
    limit = share + (over > 0) if equal else len(costs)
    parts: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, rank = heapq.heappop(loads)
        parts[rank].append(item)
        if len(parts[rank]) < limit:
            heapq.heappush(loads, (load + costs[item], rank))
        elif equal and limit > share:
            over -= 1
            if not over:
                limit = share
                loads = [entry for entry in loads if len(parts[entry[1]]) < limit]
                heapq.heapify(loads)
    return [sorted(part) for part in parts]


def imbalance(costs: Sequence[float], parts: Sequence[Sequence[int]]) -> float:
    """Largest load over the mean load."""
    loads = [sum(costs[item] for item in part) for part in parts]
    return max(loads) * len(loads) / (sum(loads) or 1.0)
