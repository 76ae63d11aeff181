"""Adds [sum, count] statistics over micro-batches, data-parallel ranks and pipeline stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

Totals = dict[str, tuple[float, float]]


def on_last_stage() -> bool:
    """Whether this rank holds the head."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def total(statistics: Iterable[Mapping[str, Tensor]]) -> Totals:
    """Sums of this rank's micro-batches, with one wait for the device."""
    sums: dict[str, Tensor] = {}
    for entry in statistics:
        for name, value in entry.items():
            sums[name] = sums[name] + value if name in sums else value
    if not sums:
        return {}
    values = torch.stack(list(sums.values())).tolist()
    return {name: (value[0], value[1]) for name, value in zip(sums, values, strict=True)}


def merge(parts: Iterable[Totals]) -> Totals:
    """Sums over ranks, in rank order."""
    merged: Totals = {}
    for part in parts:
        for name, (value, count) in part.items():
            before = merged.get(name, (0.0, 0.0))
            merged[name] = (before[0] + value, before[1] + count)
    return merged


def reduce_data_parallel(local: Totals) -> Totals:
    """Totals that every rank of a replica holds, added over data-parallel ranks."""
    data_parallel = parallel_state.get_data_parallel_group()
    if data_parallel.size() == 1:
        return local
    gathered: list[Totals] = [{} for _ in range(data_parallel.size())]
    dist.all_gather_object(gathered, local, group=data_parallel)
    return merge(gathered)


def reduce(local: Totals) -> Totals:
    """The last stages' totals, added over data-parallel ranks and known to every rank."""
    totals = reduce_data_parallel(local)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        box = [totals]
        dist.broadcast_object_list(
            box,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        totals = box[0]
    return totals


def means(totals: Totals) -> dict[str, float]:
    """Each statistic's mean; one without a count is left out."""
    return {name: value / count for name, (value, count) in totals.items() if count}


def sum_over_data_parallel(value: float) -> float:
    """A host number summed over data-parallel ranks."""
    group = parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return value
    box: list[float] = [0.0] * group.size()
    dist.all_gather_object(box, value, group=group)
    return float(sum(box))
