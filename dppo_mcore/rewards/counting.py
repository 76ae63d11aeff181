"""Counting and distance estimation: mean relative accuracy over ten thresholds."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from dppo_mcore.rewards.extraction import first_number, plain
from dppo_mcore.rewards.registry import objective
from dppo_mcore.types import Sample

TOLERANCES_10 = 1 - np.linspace(0.5, 0.95, 10)

METRES = {
    "mm": 1e-3, "millimeter": 1e-3, "millimetre": 1e-3, "cm": 1e-2, "centimeter": 1e-2, "centimetre": 1e-2, "m": 1.0,
    "meter": 1.0, "metre": 1.0, "km": 1e3, "kilometer": 1e3, "kilometre": 1e3, "in": 0.0254, "inch": 0.0254,
    "ft": 0.3048, "foot": 0.3048, "feet": 0.3048,
}  # fmt: skip
SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
_UNIT_AFTER_NUMBER = re.compile(r"\d[ \\,]{0,3}([A-Za-z]{1,10})\b")


def mean_relative_accuracy(estimate: float, truth: float) -> float:
    """Share of thresholds t in .5, .55, ..., .95 with |estimate - truth| / |truth| <= 1 - t.

    A truth of 0 leaves no scale, so only 0 itself is right.
    """
    if truth == 0:
        return float(estimate == 0)
    return float(np.mean(abs(estimate - truth) / abs(truth) <= TOLERANCES_10))


def _known(name: str, table: Mapping[str, float]) -> float | None:
    """Size of a unit by its singular or plural."""
    low = name.lower()
    return next((table[n] for n in (low, low.removesuffix("s"), low.removesuffix("es")) if n in table), None)


def _factor(unit: str, answer: str) -> float:
    """What to multiply the answer's number by to get the gold answer's unit; 1 where the units aren't comparable."""
    found = _UNIT_AFTER_NUMBER.search(plain(answer))
    if not unit or not found:
        return 1.0
    for table in (METRES, SECONDS):
        wanted, given = _known(unit, table), _known(found.group(1), table)
        if wanted and given:
            return given / wanted
    return 1.0


@objective("counting")
def counting(sample: Sample, answer: str) -> float:
    """First number of the answer against the gold number, in the unit of `extras["unit"]` where given."""
    estimate = first_number(answer)
    truth = sample.gold if isinstance(sample.gold, int | float) else first_number(str(sample.gold))
    if truth is None:
        raise ValueError(f"gold of counting sample {sample.id!r} holds no number: {sample.gold!r}")
    if estimate is None:
        return 0.0
    return mean_relative_accuracy(estimate * _factor(str(sample.extras.get("unit", "")), answer), float(truth))
