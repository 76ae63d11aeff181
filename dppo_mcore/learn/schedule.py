"""Learning rate within a phase, counted in optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dppo_mcore.config import OptimizerConfig


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then constant or decay to `min_ratio * peak` at `total_steps`."""

    peak: float
    kind: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    min_ratio: float = 1.0

    def lr(self, step: int) -> float:
        """Rate of the phase's optimizer step number `step`, from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant" or self.total_steps <= self.warmup_steps:
            return self.peak
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        left = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * left)


def phase_schedule(config: OptimizerConfig, peak: float, total_steps: int) -> Schedule:
    """The configured schedule for a phase of `total_steps` optimizer steps."""
    return Schedule(peak, config.lr_schedule, config.lr_warmup_steps, total_steps, config.lr_min_ratio)
