"""From rewards of answer groups to advantages: overlong shaping, group statistics, groups without a signal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def overlong_penalty(tokens: int, budget: int, margin: int) -> float:
    """0 up to `budget - margin` tokens, falling to -1 at `budget` (DAPO's soft punishment); 0 without a margin."""
    if margin <= 0:
        return 0.0
    return -min(1.0, max(0.0, (tokens - (budget - margin)) / margin))


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards differ; equal ones give every answer advantage 0."""
    return any(reward != rewards[0] for reward in rewards)


def group_advantages(rewards: Sequence[Sequence[float]], scale: str) -> list[list[float]]:
    """Advantages per group; scale `batch` divides by the spread over all data-parallel ranks."""
    import dppo_kernels

    everywhere = [list(map(list, rewards))]
    rank = 0
    data_parallel = parallel_state.get_data_parallel_group()
    if scale == "batch" and data_parallel.size() > 1:
        rank = data_parallel.rank()
        everywhere = [[] for _ in range(data_parallel.size())]
        dist.all_gather_object(everywhere, list(map(list, rewards)), group=data_parallel)
    groups = [group for share in everywhere for group in share]
    if not groups:
        return []
    flat = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    ids = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    values = dppo_kernels.group_advantages(flat, ids, scale=scale).tolist()
    first = sum(len(share) for share in everywhere[:rank])
    result, cursor = [], sum(len(group) for group in groups[:first])
    for group in groups[first : first + len(everywhere[rank])]:
        result.append(values[cursor : cursor + len(group)])
        cursor += len(group)
    return result
