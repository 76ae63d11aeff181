"""Whole parameters dealt out to data-parallel ranks: who owns which, and how updated ones reach everybody."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_ELEMENTS = 1 << 26
"""Elements that travel in one broadcast."""


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """Owner of each item: dearest first to the least loaded rank. The same on every rank."""
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(ranks), key=lambda rank: (loads[rank], rank))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners


@torch.no_grad()
def share_updates(parameters: Sequence[Tensor], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    """Every rank gets each parameter from its owner, in a few coalesced broadcasts."""
    if group.size() == 1:
        return
    for owner in range(group.size()):
        source = dist.get_global_rank(group, owner)
        for bucket in _buckets([p for p, who in zip(parameters, owners, strict=True) if who == owner]):
            flat = torch.cat([parameter.detach().reshape(-1) for parameter in bucket])
            dist.broadcast(flat, src=source, group=group)
            if group.rank() != owner:
                for parameter, values in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    parameter.copy_(values.view_as(parameter))


def _buckets(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    filled = 0
    for parameter in parameters:
        fits = bool(buckets) and filled + parameter.numel() <= BUCKET_ELEMENTS
        if not fits or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.numel()
    return buckets
