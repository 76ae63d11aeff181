"""What a weight sync moves, decided once from metadata: entries, owners, routes, buckets.

A bucket is a flat buffer in the engine's layout: Hugging Face tensors one after the other. Every rank of the replica
writes its own pieces of them straight into it, so each byte moves once. Ranks on other nodes than the leader can't
reach the buffer: their shards go over the pipeline group to the first stage's rank of the same tensor-parallel index
first, which writes them. That is a tensor-parallel share of the bytes per link; gathering first would be all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from dppo_mcore.model.weight_map import WeightEntry
from dppo_mcore.rollout.base import SyncError
from dppo_mcore.rollout.wire import Slot, lay_out, torch_dtype

Route = Literal["write", "forward"]


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds an entry."""

    stage: int
    dtype: str
    learns: bool
    """Whether any of its parameters is trained; a frozen one travels once."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a rank of the replica sits."""

    stage: int
    tensor_rank: int
    host: str


@dataclass(frozen=True, slots=True)
class Item:
    """One entry in a bucket."""

    name: str
    """Megatron's."""
    stage: int
    route: Route
    slots: tuple[Slot, ...]
    """One per Hugging Face tensor it becomes, in the entry's order."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Entries that travel together."""

    items: tuple[Item, ...]
    nbytes: int

    @property
    def slots(self) -> list[Slot]:
        """All tensors, in the buffer's order."""
        return [slot for item in self.items for slot in item.slots]


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """The whole sync."""

    buckets: tuple[Bucket, ...]
    stages: int
    tensor_parallel: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(slot.nbytes for bucket in self.buckets for slot in bucket.slots)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape per Hugging Face name."""
        return {slot.name: slot.shape for bucket in self.buckets for slot in bucket.slots}

    def digest(self) -> str:
        """Equal on two ranks exactly if their plans are."""
        text = json.dumps([asdict(bucket) for bucket in self.buckets] + [self.stages, self.tensor_parallel])
        return hashlib.sha256(text.encode()).hexdigest()

    def link_bytes(self) -> dict[str, int]:
        """Most bytes any one link between nodes carries, forwarding shards, and if stages gathered first."""
        full = sum(s.nbytes for b in self.buckets for i in b.items if i.route == "forward" for s in i.slots)
        return {"shards first": full // self.tensor_parallel, "gather first": full}


def make_plan(
    entries: Iterable[WeightEntry],
    owners: Mapping[str, Owner],
    places: Sequence[RankPlace],
    bucket_bytes: int,
    alignment: int,
    *,
    vision: bool,
    learning_only: bool = False,
) -> SyncPlan:
    """Buckets of at most `bucket_bytes` (a larger tensor gets one of its own), stage by stage in the map's order.

    `vision` includes the tower; `learning_only` leaves out what doesn't learn (it was sent before).
    """
    leader = next(place for place in places if place.stage == 0 and place.tensor_rank == 0)
    stages = 1 + max(place.stage for place in places)
    tensor_parallel = 1 + max(place.tensor_rank for place in places)
    if any(place.host != leader.host for place in places if place.stage == 0):
        raise SyncError(
            "tensor_model_parallel_size: the first stage's tensor-parallel ranks must share the leader's node, "
            "where the engine is"
        )
    remote = {place.stage for place in places if place.host != leader.host}
    chosen = [
        entry
        for entry in entries
        if (vision or not entry.name.startswith("vision.")) and not (learning_only and not owners[entry.name].learns)
    ]
    chosen.sort(key=lambda entry: owners[entry.name].stage)
    buckets: list[Bucket] = []
    group: list[WeightEntry] = []
    size = 0
    for entry in chosen:
        entry_bytes = _entry_bytes(entry, owners[entry.name].dtype, alignment)
        if group and size + entry_bytes > bucket_bytes:
            buckets.append(_bucket(group, owners, remote, alignment))
            group, size = [], 0
        group.append(entry)
        size += entry_bytes
    if group:
        buckets.append(_bucket(group, owners, remote, alignment))
    return SyncPlan(tuple(buckets), stages, tensor_parallel)


def _entry_bytes(entry: WeightEntry, dtype: str, alignment: int) -> int:
    itemsize = torch_dtype(dtype).itemsize
    sizes = [part.shape for part in entry.parts]
    return sum(-(-_product(shape) * itemsize // alignment) * alignment for shape in sizes)


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _bucket(group: Sequence[WeightEntry], owners: Mapping[str, Owner], remote: set[int], alignment: int) -> Bucket:
    tensors = [(part.name, owners[entry.name].dtype, part.shape) for entry in group for part in entry.parts]
    slots, nbytes = lay_out(tensors, alignment)
    items, at = [], 0
    for entry in group:
        stage = owners[entry.name].stage
        route: Route = "forward" if stage in remote else "write"
        items.append(Item(entry.name, stage, route, tuple(slots[at : at + len(entry.parts)])))
        at += len(entry.parts)
    return Bucket(tuple(items), nbytes)
