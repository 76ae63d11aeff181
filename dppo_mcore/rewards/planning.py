"""Task planning: an ordered list of steps against the gold list."""

from __future__ import annotations

from dppo_mcore.rewards.registry import objective
from dppo_mcore.rewards.sequences import gold_items, longest_common_subsequence, ordered_items
from dppo_mcore.types import Sample


@objective("planning")
def planning(sample: Sample, answer: str) -> float:
    """Longest common subsequence over the longer list's length: 1 for the gold list itself, less for extra steps."""
    raw = sample.gold if isinstance(sample.gold, list | tuple) else ordered_items(str(sample.gold))
    gold, letters = gold_items(raw)
    if not gold:
        raise ValueError(f"gold of planning sample {sample.id!r} holds no steps: {sample.gold!r}")
    said = ordered_items(answer, letters)
    return longest_common_subsequence(said, gold) / max(len(said), len(gold))
