"""A replica's ranks: those of one data-parallel copy of the model, which share one engine."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dppo_mcore.rollout.placement import Placement, Seat, engine_devices, host_name

WAIT = timedelta(hours=12)


class Replica:
    """Tensor- and pipeline-parallel ranks of one data-parallel index, over a gloo group that waits patiently.

    Made by all ranks of the job together. The leader is the group's first rank: pipeline stage 0, tensor rank 0.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self.leader = 0
        self.is_leader = True
        self.index = 0
        self._seats = [Seat(host_name(), int(os.environ.get("LOCAL_RANK", "0")))]
        self._replicas: list[tuple[int, ...]] = [(0,)]
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        from megatron.core import parallel_state

        mine = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (tuple(sorted(mine)), self._seats[0]))
        self._seats = [seat for _, seat in gathered]
        self._replicas = sorted({ranks for ranks, _ in gathered})
        for index, ranks in enumerate(self._replicas):
            group = dist.new_group(list(ranks), backend="gloo", timeout=WAIT)
            if dist.get_rank() in ranks:
                self._group, self.leader, self.index = group, ranks[0], index
        self.is_leader = dist.get_rank() == self.leader

    def devices(self, placement: Placement, tensor_parallel: int) -> tuple[int, ...]:
        """Local numbers of the accelerators this replica's engine runs on."""
        return engine_devices(placement, self._seats, self._replicas, self.index, tensor_parallel)

    def broadcast(self, value: Any = None) -> Any:
        """The leader's value on every rank. Only ranks of this job talk here."""
        if self._group is None:
            return value
        box = [value if self.is_leader else None]
        dist.broadcast_object_list(box, src=self.leader, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None
