"""Format reward: the structure that the prompt asks for is there once, in order, with nothing before or after."""

from __future__ import annotations

from typing import Literal

from dppo_mcore.rewards.extraction import ascii_lower

Structure = Literal["think-answer", "answer", "plain"]
TAGS = {
    "think-answer": ("<think>", "</think>", "<answer>", "</answer>"),
    "answer": ("<answer>", "</answer>"),
    "plain": (),
}


def format_reward(text: str, structure: Structure = "think-answer") -> float:
    """1 or 0. Both parts must hold something: an empty thought is the short cut that RL finds first."""
    tags = TAGS[structure]
    low = ascii_lower(text.strip())
    if not tags:
        return float(bool(low))
    if any(low.count(tag) != 1 for tag in tags) or not low.startswith(tags[0]) or not low.endswith(tags[-1]):
        return 0.0
    places = [low.index(tag) for tag in tags]
    if places != sorted(places):
        return 0.0
    ends = [place + len(tag) for place, tag in zip(places, tags, strict=True)]
    for part in range(0, len(tags), 2):
        if not low[ends[part] : places[part + 1]].strip():
            return 0.0
        if part and low[ends[part - 1] : places[part]].strip():
            return 0.0
    return 1.0
