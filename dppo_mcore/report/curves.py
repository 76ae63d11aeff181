"""What metrics.jsonl says: curves, where the time went, and which steps belong to which phase.

A run that goes on after a kill does the steps since its last checkpoint again, on the rollouts it has, and logs them
again at the end of the file. So a curve shows each step once, as it was last done; and a step costs once, each stage
by its dearer time: the first one generated what the second only learnt from.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

from dppo_mcore.report.read import Run, read_metrics
from dppo_mcore.report.statistics import MOST_POINTS, thin

WORK = {"rollout/flops": "generation", "train/flops": "training"}


def curves(run: Run) -> dict[str, Any]:
    """Every metric as a thinned curve; seconds, operations and span of steps by phase; when the last row came."""
    series: dict[str, dict[int, float | None]] = defaultdict(dict)
    costs = _Costs()
    spans: dict[str, list[int]] = {}
    written = 0.0
    for row in read_metrics(run.folder):
        step, phase = row["step"], str(row.get("phase", ""))
        if phase and "time/step" in row:
            span = spans.setdefault(phase, [step, step])
            span[:] = min(span[0], step), max(span[1], step)
        for name, value in row.items():
            if "/" in name:
                series[name][step] = value if _is_finite(value) else None
        costs.add(step, phase, row)
        if _is_finite(row.get("time")):
            written = max(written, row["time"])
    return {
        "series": {name: points for name, by_step in sorted(series.items()) if (points := _points(by_step))},
        "seconds": costs.by_phase("time"),
        "flops": costs.by_phase("work"),
        "spans": spans,
        "written": written,
    }


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _points(by_step: dict[int, float | None]) -> list[tuple[float, float]]:
    return thin([(step, value) for step, value in sorted(by_step.items()) if value is not None], MOST_POINTS)


def _costs(row: dict[str, Any]) -> dict[tuple[str, str], float]:
    """A row's seconds ("time", stage) and operations ("work", stage)."""
    values = {name: value for name, value in row.items() if _is_finite(value)}
    found = {("time", name.removeprefix("time/")): value for name, value in values.items() if name.startswith("time/")}
    if ("time", "train") in found:
        # The log-prob passes are part of the training time; each second is shown once.
        found["time", "train"] -= values.get("time/logprobs", 0.0)
    return found | {("work", stage): values[name] for name, stage in WORK.items() if name in values}


class _Costs:
    """Costs of every step, whatever rows it logged and however often it was done."""

    def __init__(self) -> None:
        self._dearest: dict[tuple[str, str, str, int, int], float] = {}
        self._step = -1
        self._rows: Counter[tuple[str, str, str]] = Counter()
        """How many rows of this step had such a figure: several parts of one step add up, a repetition doesn't."""

    def add(self, step: int, phase: str, row: dict[str, Any]) -> None:
        """Take in one row, in the order of the file."""
        if step != self._step:
            self._step = step
            self._rows.clear()
        for (kind, stage), cost in _costs(row).items():
            number = self._rows[kind, phase, stage]
            self._rows[kind, phase, stage] += 1
            key = (kind, phase, stage, step, number)
            self._dearest[key] = max(cost, self._dearest.get(key, 0.0))

    def by_phase(self, kind: str) -> dict[str, dict[str, float]]:
        """Sums over the steps of each phase, by stage."""
        sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for (of, phase, stage, _, _), cost in self._dearest.items():
            if of == kind:
                sums[phase][stage] += cost
        return {phase: dict(stages) for phase, stages in sums.items() if any(stages.values())}
