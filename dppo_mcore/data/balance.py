"""Work spread evenly: over data-parallel ranks, and over the rows of one rank."""

from __future__ import annotations

from collections.abc import Sequence

HOME_SLACK = 0.02
"""How much more the most loaded rank may have for the sake of homes."""


def balance(costs: Sequence[float], ranks: int, homes: Sequence[int] | None = None) -> list[list[int]]:
    """Item numbers per rank, largest item first to the least loaded rank; the same on every rank.

    `homes[item]` is the rank that an item goes to where the loads allow it: what comes again then meets its own traces.
    Items of a rank stand in their original order.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    plain, most = _fill(costs, ranks, None)
    if homes is None:
        return plain
    homely, load = _fill(costs, ranks, homes)
    return homely if load <= (1 + HOME_SLACK) * most else plain


def _fill(costs: Sequence[float], ranks: int, homes: Sequence[int] | None) -> tuple[list[list[int]], float]:
    """The parts and the largest load."""
    parts: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    limit = (1 + HOME_SLACK) * sum(costs) / ranks
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        rank = min(range(ranks), key=loads.__getitem__)
        if homes is not None and loads[homes[item]] + costs[item] <= limit:
            rank = homes[item]
        parts[rank].append(item)
        loads[rank] += costs[item]
    return [sorted(part) for part in parts], max(loads)


def imbalance(costs: Sequence[float], parts: Sequence[Sequence[int]]) -> float:
    """Largest load over the mean load."""
    loads = [sum(costs[item] for item in part) for part in parts]
    return max(loads) * len(loads) / (sum(loads) or 1.0)
