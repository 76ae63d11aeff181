"""When an RL phase has nothing more to reveal: the stagnation score, per task and over all.

Per task, over a window of steps: p is the mean success, e = |2p - 1|, f = 1 - min(1, |p_now - p_before| / 0.05) with
p_before the mean over the window just before, and S = 0.3 e + 0.7 f. Sampling noise must not hide flatness: a window
is lengthened until it holds enough prompts, and a change below two standard errors counts as none (f = 1).
A task without two full windows isn't known to be flat: its f is 0. One of which nothing is left to draw can't change
any more: its f is 1. `max_steps` bounds every phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dppo_mcore.practice.ledger_rollouts import Group

EXTREMITY_WEIGHT = 0.3
FLATNESS_WEIGHT = 0.7
FLATNESS_SCALE = 0.05
"""Change of the mean success over a window from which a task isn't flat at all."""
THRESHOLD_SLACK = 1e-9
"""0.3 * 0 + 0.7 * 1 must reach a threshold of 0.7 in floating point."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Parts of one task's score."""

    score: float
    success: float
    """Mean success over the last window."""
    change: float | None
    """Against the window before; None without two full windows."""
    error: float | None
    """Standard error of that change."""
    extremity: float
    flatness: float
    window: int
    """Steps in the window."""
    prompts: int
    """Prompts in the window."""
    ready: bool
    """Two full windows were there."""


@dataclass(frozen=True)
class Verdict:
    """The score at a step, and whether the phase ends."""

    step: int
    score: float
    tasks: Mapping[str, TaskScore]
    stop: bool
    reason: str
    frozen: tuple[str, ...] = ()
    """Tasks no longer drawn (aggregate "freeze")."""

    def numbers(self) -> dict[str, object]:
        """For the ledger."""
        return {
            "score": self.score,
            "tasks": {
                name: {field: getattr(task, field) for field in TaskScore.__slots__}  # type: ignore[attr-defined]
                for name, task in self.tasks.items()
            },
            "frozen": list(self.frozen),
        }


@dataclass(slots=True)
class _Tally:
    """Sums over prompts of one task at one step; success of a prompt is the share of its answers that succeed."""

    step: int
    prompts: int = 0
    total: float = 0.0
    squares: float = 0.0


@dataclass
class Stagnation:
    """Success of an RL phase step by step, and the score of it. `from_groups` rebuilds it from the ledger."""

    threshold: float = 0.7
    window: int = 10
    min_prompts: int = 400
    aggregate: Literal["mean", "all", "freeze"] = "mean"
    min_steps: int = 20
    max_steps: int = 500
    steps: int = 0
    """Steps seen in this phase."""
    frozen: set[str] = field(default_factory=set)
    exhausted: frozenset[str] = frozenset()
    """Tasks of which nothing is left to draw (`Draw.exhausted`)."""
    _tallies: dict[str, list[_Tally]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.window < 1 or self.min_prompts < 0:
            raise ValueError(
                f"stagnation_window must be >= 1 and stagnation_min_prompts >= 0, got {self.window} "
                f"and {self.min_prompts}"
            )
        if self.max_steps < 1:
            raise ValueError(f"rl_max_steps must be >= 1, got {self.max_steps}: a phase must end")

    def add(self, groups: Iterable[Group]) -> None:
        """Take in one step's groups (all of the same step)."""
        self.steps += 1
        for group in groups:
            series = self._tallies.setdefault(group.objective, [])
            if not series or series[-1].step != self.steps:
                series.append(_Tally(self.steps))
            rate = group.successes / group.trials
            series[-1].prompts += 1
            series[-1].total += rate
            series[-1].squares += rate * rate

    def from_groups(self, groups: Iterable[Group]) -> Stagnation:
        """Take in a phase's groups in order of step (as `Ledger.groups` gives them); returns itself.

        The tasks frozen along the way are found again by scoring each step.
        """
        by_step: dict[int, list[Group]] = {}
        for group in groups:
            by_step.setdefault(group.step, []).append(group)
        for step in sorted(by_step):
            self.add(by_step[step])
            if self.aggregate == "freeze":
                self.verdict()
        return self

    def verdict(self) -> Verdict:
        """Score of the steps seen so far, and whether the phase ends here."""
        tasks = {name: self._task(name) for name in sorted(self._tallies)}
        score = sum(task.score for task in tasks.values()) / len(tasks) if tasks else 0.0
        bar = self.threshold - THRESHOLD_SLACK
        flat = {name for name, task in tasks.items() if task.score >= bar}
        if self.aggregate == "freeze" and self.steps >= self.min_steps:
            self.frozen |= flat
        met = (
            bool(tasks)
            and {
                "mean": score >= bar,
                "all": len(flat) == len(tasks),
                "freeze": len(self.frozen) == len(tasks),
            }[self.aggregate]
        )
        listing = ", ".join(f"{name} {task.score:.2f}" for name, task in tasks.items())
        if met and self.steps >= self.min_steps:
            stop, reason = True, f"S = {score:.2f}: {listing}"
        elif self.steps >= self.max_steps:
            stop, reason = True, f"after {self.max_steps} steps at most, S = {score:.2f}: {listing}"
        else:
            stop, reason = False, f"S = {score:.2f}: {listing}"
        return Verdict(self.steps, score, tasks, stop, reason, tuple(sorted(self.frozen)))

    def _task(self, name: str) -> TaskScore:
        tallies = self._tallies[name]
        last = self._window(tallies, self.steps)
        success = last.total / last.prompts
        extremity = abs(2 * success - 1)
        change = error = None
        flatness = 0.0
        before = self._window(tallies, self.steps - last.length) if last.full else None
        if before is not None and before.full:
            change = success - before.total / before.prompts
            error = math.sqrt(last.variance() / last.prompts + before.variance() / before.prompts)
            flatness = 1.0 if abs(change) < 2 * error else 1 - min(1.0, abs(change) / FLATNESS_SCALE)
        if name in self.exhausted:
            flatness = 1.0
        score = EXTREMITY_WEIGHT * extremity + FLATNESS_WEIGHT * flatness
        ready = change is not None
        return TaskScore(score, success, change, error, extremity, flatness, last.length, last.prompts, ready)

    def _window(self, tallies: list[_Tally], end: int) -> _Window:
        """Steps (end - length, end]: the shortest, from `window` on, that holds `min_prompts` (or what there is)."""
        found = _Window()
        for tally in reversed(tallies):
            if tally.step > end:
                continue
            length = end - tally.step + 1
            if length > self.window and found.prompts >= max(1, self.min_prompts):
                break
            found.length = max(self.window, length)
            found.prompts += tally.prompts
            found.total += tally.total
            found.squares += tally.squares
        found.full = found.prompts >= max(1, self.min_prompts) and end >= found.length
        return found


@dataclass(slots=True)
class _Window:
    """Sums over a window."""

    length: int = 0
    prompts: int = 0
    total: float = 0.0
    squares: float = 0.0
    full: bool = False

    def variance(self) -> float:
        """Unbiased variance of the prompts' success."""
        if self.prompts < 2:
            return 0.0
        return max(0.0, (self.squares - self.total**2 / self.prompts) / (self.prompts - 1))
