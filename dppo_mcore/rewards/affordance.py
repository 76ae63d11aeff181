"""Affordance reasoning: points inside the gold region."""

from __future__ import annotations

import numpy as np

from dppo_mcore.rewards.registry import objective
from dppo_mcore.rewards.shapes import Numbers, gold_region, shapes_in, to_pixels
from dppo_mcore.types import Sample


@objective("affordance")
def affordance(sample: Sample, answer: str) -> float:
    """Share of predicted points inside the mask or polygon; a box counts all its pixels; nothing parsed is 0."""
    region = gold_region(sample)
    size = (int(region.size[0]), int(region.size[1])) if region.size != (1.0, 1.0) else None
    total = hits = 0
    points: list[tuple[float, float]] = []
    boxes: list[Numbers] = []
    for shape in shapes_in(answer):
        placed = to_pixels(shape.numbers, shape.normalised, size)
        if placed is None or not np.isfinite(placed).all():
            total += 1
        elif len(placed) == 2:
            points.append((placed[0], placed[1]))
        else:
            boxes.append(placed)
    if boxes:
        counter = region.boxes()
        for pixels, inside in map(counter.count, boxes):
            total, hits = total + pixels, hits + inside
    if points:
        points_N2 = np.array(points)
        hits += int(region.inside(points_N2[:, 0], points_N2[:, 1]).sum())
        total += len(points)
    return hits / total if total else 0.0
