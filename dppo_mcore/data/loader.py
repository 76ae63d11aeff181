"""Batches in an order that only the seed and the step decide, so that a run can go on from any step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dppo_mcore.data.ahead import PromptSource
from dppo_mcore.data.balance import balance
from dppo_mcore.data.errors import DataError
from dppo_mcore.data.messages import Request
from dppo_mcore.data.packing import pack_conversations, sequence_cost
from dppo_mcore.types import PackedBatch, Prompt


@dataclass(frozen=True, slots=True)
class Packing:
    """How a rank's share becomes micro-batches."""

    max_tokens: int
    pad_multiple: int = 1
    max_groups: int | None = None


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    step: int
    prompts: tuple[Prompt, ...]
    micro_batches: tuple[PackedBatch, ...]
    damaged: tuple[str, ...]
    """Ids of this rank's samples that could not be used; the batch is smaller by them."""


class Order:
    """An endless sequence of item numbers: every epoch a permutation drawn from (seed, epoch)."""

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        if size < 1:
            raise DataError("nothing to load: the list of samples is empty")
        self.size = size
        self._epoch = lru_cache(maxsize=2)(self._draw)
        self._seed = seed
        self._shuffle = shuffle

    def slots(self, start: int, count: int) -> list[int]:
        """Items at places start .. start + count of the sequence."""
        return [int(self._epoch(place // self.size)[place % self.size]) for place in range(start, start + count)]

    def _draw(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.size)
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(self.size)


def divide(source: PromptSource, requests: Sequence[Request], ranks: int, equal: bool = False) -> list[list[int]]:
    """Requests (by number) of every rank, balanced by the FLOPs of their planned prompts; equal on all ranks.

    Only plans are made, nothing is decoded. Damaged samples are in nobody's part.
    """
    plans = [source.plan(request) for request in requests]
    usable = [number for number, plan in enumerate(plans) if plan is not None]
    qwen = source.processor.qwen
    costs = [sequence_cost(plan, len(plan.token_ids), qwen) for plan in plans if plan is not None]
    return [[usable[place] for place in part] for part in balance(costs, ranks, equal)]


class BatchLoader:
    """Global batches of conversations, this rank's part of each packed.

    State is a step number: what comes next depends on nothing else. `agree` turns this rank's number of micro-batches
    into everybody's (an all-reduce with max), so that all ranks run as many.
    """

    def __init__(
        self,
        source: PromptSource,
        requests: Sequence[Request],
        batch_size: int,
        packing: Packing,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        shuffle: bool = True,
        agree: Callable[[int], int] = int,
    ) -> None:
        if batch_size < ranks:
            raise DataError(f"global_batch_size {batch_size} is less than the {ranks} data-parallel ranks")
        self._source = source
        self._requests = requests
        self._batch_size = batch_size
        self._packing = packing
        self._rank = rank
        self._ranks = ranks
        self._agree = agree
        self._order = Order(len(requests), seed, shuffle)
        self._mark = _fingerprint(requests, batch_size, seed, shuffle)
        self._next = 0
        self._parts: dict[int, list[Request]] = {}

    def __len__(self) -> int:
        """Steps of one epoch, the last one possibly reaching into the next epoch."""
        return -(-len(self._requests) // self._batch_size)

    def state(self) -> dict[str, int | str]:
        """What `restore` needs, as plain JSON values."""
        return {"step": self._next, "of": self._mark}

    def restore(self, state: dict[str, int | str]) -> None:
        """Go on where `state` was taken. Refuses a state of other samples, batch size or seed."""
        if state["of"] != self._mark:
            raise DataError("the loader's state belongs to other samples, another seed or global_batch_size")
        self._next = int(state["step"])
        self._parts.clear()
        self._source.reset()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = self._next
        if self._ranks > 1:
            self._source.plan_ahead(self._global(step + 2))
        mine = self._part(step)
        self._source.prefetch(mine)
        self._source.prefetch(self._part(step + 1))
        taken = [(request, self._source.take(request)) for request in mine]
        prompts = tuple(prompt for _, prompt in taken if prompt is not None)
        self._parts.pop(step, None)
        self._next = step + 1
        return Batch(
            step=step,
            prompts=prompts,
            micro_batches=tuple(self._pack(prompts)),
            damaged=tuple(request.sample.id for request, prompt in taken if prompt is None),
        )

    def _pack(self, prompts: Sequence[Prompt]) -> list[PackedBatch]:
        qwen, packing = self._source.processor.qwen, self._packing

        def pack(count: int | None) -> list[PackedBatch]:
            return pack_conversations(
                prompts,
                qwen,
                packing.max_tokens,
                packing.pad_multiple,
                max_groups=packing.max_groups,
                num_batches=count,
            )

        packed = pack(None)
        wanted = self._agree(len(packed))
        return packed if wanted == len(packed) else pack(wanted)

    def _global(self, step: int) -> list[Request]:
        return [self._requests[item] for item in self._order.slots(step * self._batch_size, self._batch_size)]

    def _part(self, step: int) -> list[Request]:
        """This rank's requests of a step. A single rank needs no plans to know them."""
        if step not in self._parts:
            whole = self._global(step)
            if self._ranks == 1:
                self._parts[step] = whole
            else:
                self._parts[step] = [whole[at] for at in divide(self._source, whole, self._ranks)[self._rank]]
        return self._parts[step]


def _fingerprint(requests: Sequence[Request], batch_size: int, seed: int, shuffle: bool) -> str:
    digest = hashlib.blake2b(f"{batch_size} {seed} {shuffle} {len(requests)}".encode(), digest_size=8)
    for request in requests:
        digest.update(repr(request.key).encode())
    return digest.hexdigest()
