"""A gold answer as text: what the rule reward of its objective calls right, written the way the objective asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dppo_mcore.rewards.scoring import plain_gold
from dppo_mcore.types import Sample

REGIONS = ("polygon", "polygons", "box", "boxes")


def reference(sample: Sample) -> str | None:
    """The final answer that the gold answer stands for; None where it has none in words (no gold, a mask)."""
    gold = plain_gold(sample).gold
    if sample.objective == "exact" and isinstance(gold, list | tuple):
        gold = gold[0] if gold else None
    if gold is None:
        return None
    if sample.objective in ("affordance", "boxes") and not isinstance(gold, str):
        return _shapes(gold, "[{}]" if sample.objective == "boxes" else "({})")
    if sample.objective == "success" and isinstance(gold, bool):
        return "yes" if gold else "no"
    if isinstance(gold, list | tuple):
        items = [str(item) for item in gold]
        return (", " if all(len(item) == 1 for item in items) else "\n").join(items)
    return str(gold)


def _shapes(gold: Any, brackets: str) -> str | None:
    """Every point and box of a region; shares keep a decimal point, so that they aren't read as pixels."""
    if isinstance(gold, Mapping):
        gold = None if "mask" in gold else [gold[kind] for kind in REGIONS if kind in gold]
    shapes = _leaves(gold)
    shares = all(abs(number) <= 1 for shape in shapes for number in shape)
    texts = [
        ", ".join(np.format_float_positional(n, trim="0") if shares else str(n) for n in shape) for shape in shapes
    ]
    return ", ".join(map(brackets.format, texts)) or None


def _leaves(value: Any) -> list[Any]:
    """The innermost lists, which hold numbers."""
    if not isinstance(value, list | tuple) or not value:
        return []
    if all(isinstance(part, int | float) for part in value):
        return [value]
    return [leaf for part in value for leaf in _leaves(part)]
