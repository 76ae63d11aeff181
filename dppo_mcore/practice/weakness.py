"""What the model can't do: samples that RL left without a single right answer, and the dimensions they lie in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from dppo_mcore.practice.difficulty import Tagged
from dppo_mcore.practice.ledger import Ledger


@dataclass(frozen=True, slots=True)
class WeakDimension:
    """How much of a capability dimension is weak."""

    dimension: str
    weak: int
    mined: int

    @property
    def share(self) -> float:
        """Weak samples among those mined."""
        return self.weak / self.mined if self.mined else 0.0


def candidates(ledger: Ledger, phases: Collection[str], limit: int = 0, seed: int = 0) -> list[str]:
    """Samples to roll out again by the model as RL left it: those whose last group in `phases` had no success.

    With a `limit`, that many, chosen evenly over objectives in an order given by the seed.
    """
    newest: dict[str, tuple[tuple[int, int], int, str]] = {}
    for place, phase in enumerate(sorted(phases, key=ledger.phase_key)):
        for group in ledger.groups(phase):
            at = (place, group.step)
            if group.sample_id not in newest or at >= newest[group.sample_id][0]:
                newest[group.sample_id] = (at, group.successes, group.objective)
    failed = {name: objective for name, (_, successes, objective) in newest.items() if successes == 0}
    return spread(failed, limit, seed)


def spread(objectives: Mapping[str, str], limit: int, seed: int) -> list[str]:
    """`limit` ids (0: all), taken from each objective in turn, in an order given by the seed."""
    by_objective: dict[str, list[str]] = {}
    for name in sorted(objectives, key=lambda n: sha256(f"{seed}/{n}".encode("utf-8", "surrogatepass")).digest()):
        by_objective.setdefault(objectives[name], []).append(name)
    queues = [by_objective[objective] for objective in sorted(by_objective)]
    mixed = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return mixed[:limit] if limit else mixed


def weak(ledger: Ledger, phase: str) -> list[str]:
    """Ids of the samples that were mined in `phase` and had no right answer, in order of their registration."""
    return [name for name, (_, successes) in ledger.success_rates([phase]).items() if successes == 0]


def weak_dimensions(samples: Iterable[Tagged], mined: Collection[str], weak_ids: Sequence[str]) -> list[WeakDimension]:
    """Dimensions with weak samples, the one with the most weak samples first."""
    weak_set = set(weak_ids)
    totals: dict[str, list[int]] = {}
    for sample in samples:
        if sample.id in mined:
            count = totals.setdefault(sample.dimension, [0, 0])
            count[0] += sample.id in weak_set
            count[1] += 1
    found = [WeakDimension(name, few, all_) for name, (few, all_) in totals.items() if few]
    return sorted(found, key=lambda d: (-d.weak, d.dimension))
