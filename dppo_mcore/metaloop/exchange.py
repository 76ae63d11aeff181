"""Plain Python values between ranks, over gloo: rank 0 decides, replicas share, rank 0 collects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""Ranks may wait this long for rank 0 while it asks the teacher; a failed rank ends the job by other means."""


@dataclass
class Exchange:
    """This rank's place in the job. A replica is one copy of the model over its tensor and pipeline ranks."""

    rank: int
    world: int
    replica: int
    replicas: int
    replica_rank: int
    """Place within the replica; 0 is its leader."""
    _world_group: Any = field(repr=False, default=None)
    _replica_group: Any = field(repr=False, default=None)
    _replica_ranks: list[int] = field(repr=False, default_factory=list)

    @classmethod
    def join(cls) -> Exchange:
        """Make the groups; collective over all ranks."""
        rank, world = dist.get_rank(), dist.get_world_size()
        own = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, own)
        replicas = sorted({tuple(ranks) for ranks in everyone}, key=lambda ranks: ranks[0])
        groups = {ranks: dist.new_group(list(ranks), backend="gloo", timeout=PATIENCE) for ranks in replicas}
        mine = tuple(own)
        return cls(
            rank=rank,
            world=world,
            replica=parallel_state.get_data_parallel_rank(),
            replicas=parallel_state.get_data_parallel_world_size(),
            replica_rank=own.index(rank),
            _world_group=dist.new_group(backend="gloo", timeout=PATIENCE),
            _replica_group=groups[mine],
            _replica_ranks=own,
        )

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its replica."""
        return self.replica_rank == 0

    def from_rank0(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank."""
        if self.world == 1:
            return make()
        box: list[Any] = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self._world_group)
        return box[0]

    def from_leader(self, make: Callable[[], T]) -> T:
        """What `make` returns on the replica's leader, on every rank of the replica."""
        if len(self._replica_ranks) == 1:
            return make()
        box: list[Any] = [make() if self.is_leader else None]
        dist.broadcast_object_list(box, src=self._replica_ranks[0], group=self._replica_group)
        return box[0]

    def common(self, names: Sequence[str]) -> set[str]:
        """The names that every rank of the replica has."""
        if len(self._replica_ranks) == 1:
            return set(names)
        parts: list[Any] = [None] * len(self._replica_ranks)
        dist.all_gather_object(parts, list(names), group=self._replica_group)
        return set(names).intersection(*parts)

    def at_rank0(self, values: list[T]) -> list[T]:
        """The replicas' lists one after the other, on rank 0; elsewhere empty. Only leaders' lists count."""
        if self.world == 1:
            return values
        parts: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(values if self.is_leader else [], parts, dst=0, group=self._world_group)
        return [value for part in parts or [] for value in part]

    def everywhere(self, values: list[T]) -> list[T]:
        """The replicas' lists one after the other, on every rank."""
        if self.world == 1:
            return values
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, values if self.is_leader else [], group=self._world_group)
        return [value for part in parts for value in part]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(group=self._world_group)
