"""Small statistics the report states: intervals and thinned series."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959964
MOST_POINTS = 400
"""Points per curve; longer ones are averaged over runs of steps."""


def wilson(successes: float, count: int) -> tuple[float, float]:
    """95% Wilson interval of a share; (0, 1) without any observation."""
    if count == 0:
        return 0.0, 1.0
    p, z2 = successes / count, Z95 * Z95
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: means over runs of neighbours; the last point keeps its place."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    chunks = [points[k : k + size] for k in range(0, len(points), size)]
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]
