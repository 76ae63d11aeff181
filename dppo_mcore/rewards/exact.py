"""General questions: exact match after normalisation; numbers compare by value."""

from __future__ import annotations

from dppo_mcore.rewards.choice import choice_reward
from dppo_mcore.rewards.registry import objective
from dppo_mcore.types import Sample


@objective("exact")
def exact(sample: Sample, answer: str) -> float:
    """1 where the answer is the gold answer (one of them, if gold is a list), or names the option that it is."""
    golds = sample.gold if isinstance(sample.gold, list | tuple) else [sample.gold]
    return max((choice_reward(_with_gold(sample, gold), answer) for gold in golds), default=0.0)


def _with_gold(sample: Sample, gold: object) -> Sample:
    return Sample(sample.id, sample.objective, (), gold=gold, extras=sample.extras)
