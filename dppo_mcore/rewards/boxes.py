"""Boxes: intersection over union with the gold boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dppo_mcore.rewards.registry import objective
from dppo_mcore.rewards.shapes import Numbers, image_size, shapes_in, to_pixels
from dppo_mcore.types import Sample

MAX_BOXES = 64


def iou(a: Numbers, b: Numbers) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); an empty box has none."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def _gold_boxes(sample: Sample) -> list[Numbers]:
    gold: Any = sample.gold
    if isinstance(gold, dict):
        gold = gold.get("boxes", gold.get("box"))
    if isinstance(gold, str):
        return [shape.numbers for shape in shapes_in(gold) if len(shape.numbers) == 4]
    if isinstance(gold, Sequence) and gold and not isinstance(gold[0], Sequence):
        gold = [gold]
    return [tuple(float(number) for number in box) for box in gold or ()]


@objective("boxes")
def boxes(sample: Sample, answer: str) -> float:
    """Mean IoU over the best pairs of predicted and gold boxes; a missing or surplus box counts as 0."""
    golds = _gold_boxes(sample)
    if not golds or any(len(box) != 4 for box in golds):
        raise ValueError(f"gold of boxes sample {sample.id!r} holds no [x0, y0, x1, y1]: {str(sample.gold)[:200]}")
    size = image_size(sample)
    shares = max(map(max, golds)) <= 1
    if size is not None or shares:
        golds = [box for gold in golds if (box := to_pixels(gold, shares, size)) is not None]
    said = []
    for shape in [shape for shape in shapes_in(answer) if len(shape.numbers) == 4][:MAX_BOXES]:
        placed = to_pixels(shape.numbers, shape.normalised, size)
        if size is None and not shares:
            placed = None if shape.normalised else shape.numbers
        said.append(placed if placed is not None and np.isfinite(placed).all() else (0.0, 0.0, 0.0, 0.0))
    overlaps = sorted(((iou(p, g), i, j) for i, p in enumerate(said) for j, g in enumerate(golds)), reverse=True)
    total, used_said, used_gold = 0.0, set(), set()
    for overlap, i, j in overlaps:
        if i not in used_said and j not in used_gold:
            total += overlap
            used_said.add(i)
            used_gold.add(j)
    return total / max(len(said), len(golds)) if said else 0.0
