"""Functions for testing the rank pool itself."""

from __future__ import annotations

import torch
import torch.distributed as dist


def rank_sum(value: int) -> int:
    """All-reduce of rank * value."""
    tensor = torch.tensor([dist.get_rank() * value])
    dist.all_reduce(tensor)
    return int(tensor)


def fail_on(rank: int) -> None:
    """Raise on one rank while the others wait in a collective."""
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()
