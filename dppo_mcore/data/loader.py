"""Batches in an order that only the seed and the step decide, so that a run can go on from any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from dppo_mcore.data.ahead import PromptSource
from dppo_mcore.data.balance import balance
from dppo_mcore.data.errors import DataError
from dppo_mcore.data.messages import Request
from dppo_mcore.data.packing import sequence_cost
from dppo_mcore.types import Prompt

PATH_PARTS = 3


class Order:
    """An endless sequence of item numbers: every epoch a permutation drawn from (seed, epoch).

    With a window only the items of every so many in a row change places: a curriculum keeps its course.
    """

    def __init__(self, size: int, seed: int, window: int = 0) -> None:
        self.size = size
        self._epoch = lru_cache(maxsize=2)(self._draw)
        self._seed, self._window = seed, window

    def slots(self, start: int, count: int) -> list[int]:
        """Items at places start .. start + count of the sequence."""
        if self.size < 1:
            raise DataError("nothing to load: the list of samples is empty")
        return [int(self._epoch(place // self.size)[place % self.size]) for place in range(start, start + count)]

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        starts = range(0, self.size, self._window or self.size)
        ends = [*starts[1:], self.size]
        return np.concatenate([start + rng.permutation(end - start) for start, end in zip(starts, ends, strict=True)])


def home_of(request: Request, ranks: int) -> int:
    """The rank that a request goes to wherever balance allows it, by its media: a clip that comes again is cached.

    The end of a path is enough, and leaves the division the same when a data set is moved.
    """
    ends = ["/".join(media.path.rsplit("/", PATH_PARTS)[-PATH_PARTS:]) for media in request.sample.media]
    name = "\n".join(ends or [request.sample.id]).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(name, digest_size=8).digest()) % ranks


def divide(source: PromptSource, requests: Sequence[Request], ranks: int) -> list[list[int]]:
    """Requests (by number) of every rank, balanced by the FLOPs of their planned prompts; equal on all ranks.

    Only plans are made, nothing is decoded. Damaged samples are in nobody's part.
    """
    source.plan_ahead(requests)
    plans = [source.plan(request) for request in requests]
    usable = [number for number, plan in enumerate(plans) if plan is not None]
    qwen = source.processor.qwen
    costs = [sequence_cost(plan, len(plan.token_ids), qwen) for plan in plans if plan is not None]
    homes = [home_of(requests[number], ranks) for number in usable]
    return [[usable[place] for place in part] for part in balance(costs, ranks, homes)]


class Batches:
    """Global batches of `batch_size` out of `size` conversations, this replica's share of each decoded.

    What comes next depends on seed (shuffled as in `Order`) and `step` only: a killed run goes on by starting at
    its step. `request` makes conversation number i; `share` picks this replica's part of a step's requests,
    the same way on all ranks, and is called for every step in order; `plans` says that it plans on this rank. The step
    after the one asked for is decoded meanwhile, and the one after that is planned. Damaged samples are left out (and
    are in the source's quarantine): a batch is smaller by them.
    """

    def __init__(
        self,
        source: PromptSource,
        request: Callable[[int], Request],
        size: int,
        batch_size: int,
        seed: int,
        share: Callable[[Sequence[Request]], Sequence[Request]] = list,
        plans: bool = False,
        step: int = 0,
        steps: int | None = None,
        window: int = 0,
    ) -> None:
        self._source = source
        self._request = request
        self._batch_size = batch_size
        self._share = share
        self._plans = plans
        self._steps = steps
        self._order = Order(size, seed, window)
        self.step = step
        """Number of the batch that comes next."""
        self._upcoming: Sequence[Request] | None = None
        self._planned: tuple[int, list[Request]] | None = None

    def __iter__(self) -> Iterator[list[Prompt]]:
        return self

    def __next__(self) -> list[Prompt]:
        if self._over(self.step):
            raise StopIteration
        mine = self._share(self._requests(self.step)) if self._upcoming is None else self._upcoming
        self.step += 1
        self._upcoming = () if self._over(self.step) else self._share(self._requests(self.step))
        self._source.prefetch([*mine, *self._upcoming])
        if self._plans and not self._over(self.step + 1):
            self._source.plan_ahead(self._requests(self.step + 1))
        return [prompt for request in mine if (prompt := self._source.take(request)) is not None]

    def _over(self, step: int) -> bool:
        return self._steps is not None and step >= self._steps

    def _requests(self, step: int) -> list[Request]:
        """Of a step; those made last are kept, for a step is first planned, then divided."""
        if self._planned is None or self._planned[0] != step:
            places = self._order.slots(step * self._batch_size, self._batch_size)
            self._planned = (step, [self._request(place) for place in places])
        return self._planned[1]
