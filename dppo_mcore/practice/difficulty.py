"""Which samples RL practises: success rates make the buffer, the buffer makes each step's prompts.

Mastered samples (every answer right) are dropped, intractable ones (every answer wrong) are capped, the rest are drawn
in proportion to p(1-p). p is known from a few answers only, so the weight is the expectation of p(1-p) under a uniform
prior, (s+1)(f+1) / ((n+2)(n+3)): an intractable sample keeps some weight and a lucky one isn't over-trusted.

An epoch draws as many prompts as there are samples kept. Every stratum (objective, dimension) gets its share, a
sample's expected number of draws follows its weight, and the strata are spread evenly over the epoch's steps.
All is a function of the seed and the recorded success counts, so a resumed run draws the same.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Literal, Protocol

import numpy as np

from dppo_mcore.practice.ledger import BufferRow
from dppo_mcore.practice.ledger_rollouts import Group
from dppo_mcore.practice.stagnation import Stagnation, Standing

Status = Literal["kept", "intractable", "mastered", "anchor", "over-cap"]
DRAWN = ("kept", "intractable", "anchor")
OLD_GROUP_WEIGHT = 0.5
"""What earlier answers of a sample count for once it was rolled out again under newer weights."""


class Tagged(Protocol):
    """What the buffer needs of a sample (`types.Sample` and `ledger.SampleRow` both have it)."""

    @property
    def id(self) -> str: ...
    @property
    def objective(self) -> str: ...
    @property
    def dimension(self) -> str: ...


@dataclass(slots=True)
class _Entry:
    objective: str
    dimension: str
    status: str
    trials: float
    successes: float
    weight: float = 1.0
    """How many samples it stood for when it was drawn last."""


def practice_weight(trials: float, successes: float) -> float:
    """Expected p(1-p) after `successes` of `trials` under a uniform prior on p."""
    return (successes + 1) * (trials - successes + 1) / ((trials + 2) * (trials + 3))


def make_buffer(
    samples: Iterable[Tagged],
    counts: Mapping[str, tuple[int, int]],
    *,
    intractable_share: float = 0.25,
    anchor_share: float = 0.0,
    last_tries: Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[BufferRow]:
    """What becomes of each sample with counts (trials, successes): kept, mastered, intractable, over-cap or anchor.

    Intractable samples make up at most `intractable_share` of each task's buffer, the least recently tried first
    (`last_tries`: larger is more recent; ties in an order given by the seed). Anchors are mastered samples kept as
    `anchor_share` of each task's buffer.
    """
    tried = last_tries or {}
    by_task: dict[str, list[Tagged]] = {}
    for sample in samples:
        if counts.get(sample.id, (0, 0))[0] > 0:
            by_task.setdefault(sample.objective, []).append(sample)
    rows = []
    for task in sorted(by_task):
        members = by_task[task]
        mastered = [s.id for s in members if counts[s.id][0] == counts[s.id][1]]
        intractable = [s.id for s in members if counts[s.id][1] == 0]
        middle = len(members) - len(mastered) - len(intractable)
        intractable.sort(key=lambda name: (tried.get(name, -1), _shuffle_key(seed, name)))
        mastered.sort(key=lambda name: _shuffle_key(seed, name))
        capped = set(intractable[_cap(middle, intractable_share) :]) if middle else set()
        anchors = set(mastered[: _cap(middle + len(intractable) - len(capped), anchor_share)])
        for sample in members:
            trials, successes = counts[sample.id]
            if successes == trials:
                status: Status = "anchor" if sample.id in anchors else "mastered"
            elif successes == 0:
                status = "over-cap" if sample.id in capped else "intractable"
            else:
                status = "kept"
            rows.append(BufferRow(sample.id, status, trials, successes))
    return rows


def _cap(others: int, share: float) -> int:
    """How many may join `others` so that they make up at most `share` of the whole."""
    return 10**9 if share >= 1 else int(others * share / (1 - share) + 1e-9)


def _shuffle_key(seed: int, name: str) -> bytes:
    return sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()


class Draw:
    """Prompts of an RL phase, step by step. `draw` then `update` with what came of it, in that order."""

    def __init__(
        self,
        samples: Iterable[Tagged],
        buffer: Sequence[BufferRow],
        *,
        seed: int,
        sampling: Literal["difficulty", "random"] = "difficulty",
    ) -> None:
        status = {row.sample_id: row for row in buffer}
        self._entries: dict[str, _Entry] = {}
        for sample in samples:
            row = status.get(sample.id)
            if sampling == "random":
                row = row or BufferRow(sample.id, "kept", 0, 0)
            if row is not None:
                self._entries[sample.id] = _Entry(
                    sample.objective, sample.dimension, row.status, row.trials, row.successes
                )
        self._random = sampling == "random"
        self._seed = seed
        self._epoch = -1
        self._queue: deque[str] = deque()
        self._frozen: frozenset[str] = frozenset()
        self._weights: dict[str, float] = {}
        self._live: Counter[str] = Counter(e.objective for e in self._entries.values() if self._drawn(e))
        self._began = Counter(self._live)
        self._left: dict[str, float] = {}
        """By objective, the success of what was mastered on the way, summed up."""

    @property
    def epoch(self) -> int:
        """Epochs begun, less one."""
        return self._epoch

    def drawable(self) -> list[str]:
        """Ids that can still be drawn."""
        return [name for name, entry in self._entries.items() if self._drawn(entry)]

    def __len__(self) -> int:
        return len(self._entries)

    def spent(self) -> Counter[str]:
        """Samples that can't be drawn any more, by why: mastered, over-cap or frozen."""
        return Counter(
            "frozen" if entry.objective in self._frozen else entry.status
            for entry in self._entries.values()
            if not self._drawn(entry)
        )

    def exhausted(self) -> frozenset[str]:
        """Objectives of which something was drawable at first and nothing is any more."""
        return frozenset(objective for objective, count in self._live.items() if count == 0)

    def _drawn(self, entry: _Entry) -> bool:
        return entry.objective not in self._frozen and (self._random or entry.status in DRAWN)

    def freeze(self, objectives: Iterable[str]) -> None:
        """Draw these objectives no more in this phase."""
        self._frozen = frozenset(objectives)

    def draw(self, prompts: int) -> list[str]:
        """Ids of the next step's prompts, all different; fewer where fewer are left, none where nothing is."""
        chosen: dict[str, None] = {}
        deferred: dict[str, None] = {}
        live = sum(count for objective, count in self._live.items() if objective not in self._frozen)
        wanted = min(prompts, live)
        while len(chosen) < wanted:
            if not self._queue:
                self._queue.extend(self._next_epoch())
            name = self._queue.popleft()
            if not self._drawn(self._entries[name]):
                continue
            if name in chosen:
                deferred[name] = None
            else:
                chosen[name] = None
                self._entries[name].weight = self._weights.get(name, 1.0)
        self._queue.extendleft(reversed(deferred))
        return list(chosen)

    def peek(self, prompts: int) -> list[str]:
        """What `draw` would give now, as far as that is settled: the epoch after this one isn't drawn yet."""
        names = (name for name in self._queue if self._drawn(self._entries[name]))
        return list(islice(dict.fromkeys(names), prompts))

    def update(self, groups: Iterable[Group]) -> dict[str, Standing]:
        """Re-score samples by their newest groups; returns, by sample, what each group stood for when it was drawn.

        A sample that is drawn seldom stands for more of them. One that is mastered leaves with the success of its last
        group under a uniform prior: luck had its part in that group. Under random sampling each stands for itself.
        """
        standings: dict[str, Standing] = {}
        live, left = Counter(self._live), dict(self._left)
        for group in groups:
            entry = self._entries.get(group.sample_id)
            if entry is None:
                continue
            task, began = entry.objective, self._began[entry.objective]
            if began and not self._random:
                standings[group.sample_id] = Standing(entry.weight, live[task] / began, left.get(task, 0.0) / began)
            entry.trials = OLD_GROUP_WEIGHT * entry.trials + group.trials
            entry.successes = OLD_GROUP_WEIGHT * entry.successes + group.successes
            if entry.status == "anchor" or self._random:
                continue
            before = entry.status in DRAWN
            if group.successes == group.trials:
                entry.status = "mastered"
            elif group.successes > 0:
                entry.status = "kept"
            now = entry.status in DRAWN
            self._live[task] += now - before
            if before and not now:
                self._left[task] = self._left.get(task, 0.0) + (group.successes + 1) / (group.trials + 2)
        return standings

    def replay(
        self, groups: Iterable[Group], prompts: int, stagnation: Stagnation | None = None, *, steps: int | None = None
    ) -> None:
        """Go on to where a phase stood after `steps` steps (the last recorded one by default), by its recorded groups.

        A step all of whose samples turned out damaged has no groups and counts all the same. With `stagnation` (a
        fresh one) its score is brought there too, and what it froze on the way stays frozen.
        """
        by_step: dict[int, list[Group]] = {}
        for group in groups:
            by_step.setdefault(group.step, []).append(group)
        for step in range(1 + max(by_step, default=-1) if steps is None else steps):
            self.draw(prompts)
            standings = self.update(by_step.get(step, ()))
            if stagnation is not None:
                stagnation.add(by_step.get(step, ()), standings)
                stagnation.exhausted = self.exhausted()
                self.freeze(stagnation.verdict().frozen)

    def _next_epoch(self) -> list[str]:
        self._epoch += 1
        rng = np.random.default_rng([self._seed, self._epoch])
        names = self.drawable()
        if self._random:
            return [names[i] for i in rng.permutation(len(names))]
        strata: dict[tuple[str, str], list[str]] = {}
        for name in names:
            entry = self._entries[name]
            strata.setdefault((entry.objective, entry.dimension), []).append(name)
        placed: list[tuple[float, str]] = []
        for stratum in sorted(strata):
            picks = self._pick(strata[stratum], rng)
            # One pick in each equal part of the epoch keeps every step's mix like the whole's.
            places_N = (np.arange(len(picks)) + rng.random(len(picks))) / len(picks)
            placed += zip(places_N.tolist(), picks, strict=True)
        return [name for _, name in sorted(placed)]

    def _pick(self, members: list[str], rng: np.random.Generator) -> list[str]:
        """As many draws as members: systematic sampling, so each appears floor or ceil of its expected times."""
        order = [members[i] for i in rng.permutation(len(members))]
        weights_N = np.array([practice_weight(self._entries[n].trials, self._entries[n].successes) for n in order])
        edges_N = np.cumsum(weights_N) / weights_N.sum() * len(order)
        edges_N[-1] = len(order)
        self._weights |= zip(order, (weights_N.mean() / weights_N).tolist(), strict=True)
        hits_N = np.searchsorted(edges_N, np.arange(len(order)) + rng.random(), side="right")
        return [order[i] for i in rng.permutation(np.minimum(hits_N, len(order) - 1))]
