"""Points and boxes in answers, and the regions a gold answer may be: mask, polygons or boxes.

Coordinates with a decimal point within [0, 1] are shares of width and height, all others are pixels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from dppo_mcore.types import Sample

Numbers = tuple[float, ...]
MAX_SHAPES = 4096
RASTER = 512
"""Most rows and columns a polygon is drawn at to count the pixels of boxes."""

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_GROUP = re.compile(rf"[(\[]\s?({_NUMBER}(?:\s?,\s?{_NUMBER}){{1,3}})\s?,?\s?[)\]]")


@dataclass(frozen=True, slots=True)
class Shape:
    """A point (x, y) or a box (x0, y0, x1, y1) as written."""

    numbers: Numbers
    normalised: bool


def shapes_in(answer: str) -> list[Shape]:
    """Every pair and quadruple in brackets, in order; at most `MAX_SHAPES`."""
    found = []
    for match in _GROUP.finditer(answer):
        words = [word.strip() for word in match.group(1).split(",")]
        if len(words) == 3:
            continue
        numbers = tuple(float(word) for word in words)
        decimals = any("." in word for word in words)
        found.append(Shape(numbers, decimals and all(0 <= number <= 1 for number in numbers)))
        if len(found) == MAX_SHAPES:
            break
    return found


def image_size(sample: Sample) -> tuple[int, int] | None:
    """(height, width) in pixels from `extras["size"]`."""
    size = sample.extras.get("size")
    return None if size is None else (int(size[0]), int(size[1]))


def to_pixels(numbers: Numbers, normalised: bool, size: tuple[int, int] | None) -> Numbers | None:
    """Coordinates in pixels; without an image size shares stay shares, and pixels can't be placed (None)."""
    if size is None:
        return numbers if normalised else None
    if not normalised:
        return numbers
    height, width = size
    return tuple(number * (height if i % 2 else width) for i, number in enumerate(numbers))


@dataclass(frozen=True)
class Region:
    """Where a point is right. `size` is (height, width) in the unit of the coordinates."""

    size: tuple[float, float]
    mask_HW: np.ndarray | None = None
    polygons: tuple[np.ndarray, ...] = ()

    def inside(self, x_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
        """Whether each point lies in the region; outside the image is outside."""
        height, width = self.size
        seen_N = (x_N >= 0) & (x_N < width) & (y_N >= 0) & (y_N < height)
        if self.mask_HW is None:
            hit_N = np.zeros(len(x_N), dtype=bool)
            for polygon_V2 in self.polygons:
                hit_N |= in_polygon(x_N, y_N, polygon_V2)
            return seen_N & hit_N
        rows_N = np.where(seen_N, y_N, 0).astype(np.int64)
        columns_N = np.where(seen_N, x_N, 0).astype(np.int64)
        return seen_N & self.mask_HW[rows_N, columns_N]

    def boxes(self) -> BoxCounter:
        """For counting the pixels of many boxes."""
        if self.mask_HW is not None:
            return BoxCounter(self.mask_HW, 1.0, 1.0)
        height, width = self.size
        shares = self.size == (1.0, 1.0)
        rows, columns = (RASTER if shares else min(RASTER, int(side)) for side in (height, width))
        y_RC, x_RC = np.mgrid[0:rows, 0:columns] + 0.5
        inside = self.inside(x_RC.ravel() * (width / columns), y_RC.ravel() * (height / rows))
        return BoxCounter(inside.reshape(rows, columns), columns / width, rows / height)


class BoxCounter:
    """Pixels of boxes and how many of them lie in a region, by its summed-area table: constant time per box."""

    def __init__(self, inside_RC: np.ndarray, x_scale: float, y_scale: float) -> None:
        self._rows, self._columns = inside_RC.shape
        self._sum_RC = np.zeros((self._rows + 1, self._columns + 1), dtype=np.int64)
        self._sum_RC[1:, 1:] = inside_RC.cumsum(0, dtype=np.int64).cumsum(1)
        self._x_scale, self._y_scale = x_scale, y_scale

    def count(self, box: Numbers) -> tuple[int, int]:
        """(pixels, pixels inside the region) of the part of the box that is in the image."""
        x0, x1 = (int(min(max(v * self._x_scale, 0), self._columns)) for v in (box[0], box[2]))
        y0, y1 = (int(min(max(v * self._y_scale, 0), self._rows)) for v in (box[1], box[3]))
        if x1 <= x0 or y1 <= y0:
            return 0, 0
        table_RC = self._sum_RC
        hits = table_RC[y1, x1] - table_RC[y0, x1] - table_RC[y1, x0] + table_RC[y0, x0]
        return (x1 - x0) * (y1 - y0), int(hits)


def in_polygon(x_N: np.ndarray, y_N: np.ndarray, polygon_V2: np.ndarray) -> np.ndarray:
    """Even-odd rule; points on an edge are inside."""
    odd_N = np.zeros(len(x_N), dtype=bool)
    edge_N = np.zeros(len(x_N), dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon_V2, np.roll(polygon_V2, -1, axis=0), strict=True):
        cross_N = (x1 - x0) * (y_N - y0) - (y1 - y0) * (x_N - x0)
        within_N = (np.minimum(x0, x1) <= x_N) & (x_N <= np.maximum(x0, x1))
        within_N &= (np.minimum(y0, y1) <= y_N) & (y_N <= np.maximum(y0, y1))
        edge_N |= within_N & (np.abs(cross_N) <= 1e-9 * (1 + np.abs(x1 - x0) + np.abs(y1 - y0)))
        if y0 != y1:
            crosses_N = (y0 > y_N) != (y1 > y_N)
            odd_N ^= crosses_N & (x_N < (x1 - x0) * (y_N - y0) / (y1 - y0) + x0)
    return odd_N | edge_N


def gold_region(sample: Sample) -> Region:
    """Region from gold (or extras): {"mask"}, {"polygon"}, {"polygons"}, {"box"}, {"boxes"}, or bare lists of them.

    A mask is rows of 0/1 or the path of an image or .npy file (relative: in the folder of the sample's first
    medium); it sets the image's size. A bare list of four numbers
    is a box, a bare list of pairs a polygon. Gold coordinates of which none exceeds 1 are shares.
    """
    gold: Any = sample.gold
    if not isinstance(gold, Mapping):
        kinds = ("mask", "polygon", "polygons", "box", "boxes")
        named = {kind: sample.extras[kind] for kind in kinds if kind in sample.extras}
        gold = named or _bare(gold)
    if not isinstance(gold, Mapping):
        raise ValueError(f"gold of sample {sample.id!r} is no region (mask, polygon, box): {str(gold)[:200]}")
    if "mask" in gold:
        mask_HW = _mask_file(_beside(sample, gold["mask"])) if isinstance(gold["mask"], str) else _rows(gold["mask"])
        return Region((mask_HW.shape[0], mask_HW.shape[1]), mask_HW)
    polygons = list(gold.get("polygons", ())) + ([gold["polygon"]] if "polygon" in gold else [])
    for x0, y0, x1, y1 in list(gold.get("boxes", ())) + ([gold["box"]] if "box" in gold else []):
        polygons.append([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    if not polygons:
        raise ValueError(f"gold of sample {sample.id!r} is no region (mask, polygon, box): {str(gold)[:200]}")
    corners = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons]
    shares = max(float(np.abs(corners_V2).max()) for corners_V2 in corners) <= 1
    size = image_size(sample)
    if size is None:
        if not shares:
            raise ValueError(f"sample {sample.id!r} has gold in pixels: give extras['size'] = [height, width]")
        return Region((1.0, 1.0), polygons=tuple(corners))
    scale_2 = np.array([size[1], size[0]]) if shares else 1.0
    return Region(size, polygons=tuple(corners_V2 * scale_2 for corners_V2 in corners))


def _bare(gold: Any) -> Any:
    if not isinstance(gold, Sequence) or isinstance(gold, str) or not gold:
        return gold
    if all(isinstance(value, int | float) for value in gold):
        return {"box": gold} if len(gold) == 4 else gold
    if all(isinstance(value, Sequence) and len(value) == 2 for value in gold):
        return {"polygon": gold}
    if all(isinstance(value, Sequence) and len(value) == 4 for value in gold):
        return {"boxes": gold}
    return gold


def _beside(sample: Sample, path: str) -> str:
    """A relative path lies in the folder of the sample's first medium."""
    folder = os.path.dirname(sample.media[0].path) if sample.media else ""
    return os.path.join(folder, path)


def _rows(mask: Any) -> np.ndarray:
    return np.asarray(mask) > 0


@lru_cache(maxsize=256)
def _mask_file(path: str) -> np.ndarray:
    if path.endswith(".npy"):
        return np.load(path) > 0
    from PIL import Image

    with Image.open(path, formats=("PNG", "TIFF", "BMP", "GIF", "JPEG", "WEBP")) as image:
        return np.asarray(image.convert("L")) > 0
