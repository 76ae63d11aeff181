"""Causal and temporal reasoning: multiple choice, or the order of events."""

from __future__ import annotations

from dppo_mcore.rewards.choice import choice_reward
from dppo_mcore.rewards.registry import objective
from dppo_mcore.rewards.sequences import gold_items, ordered_items, pair_agreement
from dppo_mcore.types import Sample


@objective("temporal")
def temporal(sample: Sample, answer: str) -> float:
    """A list as gold answer: normalised Kendall tau, (tau + 1) / 2. Otherwise the right option."""
    if not isinstance(sample.gold, list | tuple):
        return choice_reward(sample, answer)
    gold, letters = gold_items(sample.gold)
    return pair_agreement(ordered_items(answer, letters), gold)
