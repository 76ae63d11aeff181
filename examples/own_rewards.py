"""The rule reward of docs/tutorial.md: an objective of one's own, given to the trainer by --objectives."""

from __future__ import annotations

from dppo_mcore.rewards.registry import objective
from dppo_mcore.types import Sample


@objective("colour")
def colour(sample: Sample, answer: str) -> float:
    """1 for the right colour, else 0."""
    return float(answer.strip().lower() == sample.gold)
