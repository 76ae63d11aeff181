"""Task prediction: which action comes next, by option or by name."""

from __future__ import annotations

from dppo_mcore.rewards.choice import choice_reward
from dppo_mcore.rewards.registry import objective
from dppo_mcore.types import Sample


@objective("prediction")
def prediction(sample: Sample, answer: str) -> float:
    """The right option, or the next action by exact match after normalisation."""
    return choice_reward(sample, answer)
