"""When an RL phase has nothing more to reveal: the stagnation score, per task and over all.

Per task, over a window of steps: p is the mean success, e = |2p - 1|, f = 1 - min(1, |p_now - p_before| / 0.05) with
p_before the mean over the window just before, and S = 0.3 e + 0.7 f. Sampling noise must not hide flatness: a window
is lengthened until it holds enough prompts, and a change below two standard errors counts as none (f = 1).

p is that of the samples the task began with, not of those that are drawn: drawing prefers what is right half of the
time and gives up what is mastered, so the success of the drawn stays where it is while the model gets better. Each
group therefore counts by its `Standing`. Without one (random sampling) it stands for itself.
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
class Standing:
    """What a drawn group says of all samples that its task began with."""

    weight: float = 1.0
    """How many samples it stands for among those still drawn."""
    drawn: float = 1.0
    """Share of the task's samples that are still drawn."""
    left: float = 0.0
    """Success of the others when they left, times their share."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Parts of one task's score."""

    score: float
    success: float
    """Mean success over the last window, of all samples the task began with."""
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
class _Sums:
    """Sums over prompts of one task, of weights w and of success r: what a mean and its error are made of."""

    prompts: int = 0
    w: float = 0.0
    wr: float = 0.0
    ww: float = 0.0
    wwr: float = 0.0
    wwrr: float = 0.0

    def add(self, rate: float, weight: float) -> None:
        """Take in one prompt."""
        self.prompts += 1
        self.w += weight
        self.wr += weight * rate
        self.ww += weight**2
        self.wwr += weight**2 * rate
        self.wwrr += weight**2 * rate**2

    def merge(self, other: _Sums) -> None:
        """Take in other prompts."""
        self.prompts += other.prompts
        self.w += other.w
        self.wr += other.wr
        self.ww += other.ww
        self.wwr += other.wwr
        self.wwrr += other.wwrr

    def mean(self) -> float:
        """Weighted mean success."""
        return self.wr / self.w

    def squared_error(self) -> float:
        """Squared standard error of the mean, unbiased for equal weights."""
        if self.prompts < 2:
            return 0.0
        mean = self.mean()
        spread = max(0.0, self.wwrr - 2 * mean * self.wwr + mean**2 * self.ww)
        return spread / self.w**2 * self.prompts / (self.prompts - 1)


@dataclass(slots=True)
class _Window:
    """Steps and what they hold."""

    length: int = 0
    sums: _Sums = field(default_factory=_Sums)
    full: bool = False


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
    _tallies: dict[str, list[tuple[int, _Sums]]] = field(default_factory=dict)
    """By task, the steps in which it had prompts."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.min_prompts < 0:
            raise ValueError(
                f"stagnation_window must be >= 1 and stagnation_min_prompts >= 0, got {self.window} "
                f"and {self.min_prompts}"
            )
        if self.max_steps < 1:
            raise ValueError(f"rl_max_steps must be >= 1, got {self.max_steps}: a phase must end")

    def add(self, groups: Iterable[Group], standings: Mapping[str, Standing] | None = None) -> None:
        """Take in one step's groups (all of the same step), with what they stand for (by sample, `Draw.update`)."""
        self.steps += 1
        for group in groups:
            standing = (standings or {}).get(group.sample_id, Standing())
            series = self._tallies.setdefault(group.objective, [])
            if not series or series[-1][0] != self.steps:
                series.append((self.steps, _Sums()))
            rate = standing.drawn * group.successes / group.trials + standing.left
            series[-1][1].add(rate, standing.weight)

    def from_groups(self, groups: Iterable[Group]) -> Stagnation:
        """Take in a phase's groups in order of step (as `Ledger.groups` gives them), each for itself; returns itself.

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
        success = last.sums.mean()
        extremity = abs(2 * success - 1)
        change = error = None
        flatness = 0.0
        before = self._window(tallies, self.steps - last.length) if last.full else None
        if before is not None and before.full:
            change = success - before.sums.mean()
            error = math.sqrt(last.sums.squared_error() + before.sums.squared_error())
            flatness = 1.0 if abs(change) < 2 * error else 1 - min(1.0, abs(change) / FLATNESS_SCALE)
        if name in self.exhausted:
            flatness = 1.0
        score = EXTREMITY_WEIGHT * extremity + FLATNESS_WEIGHT * flatness
        ready = change is not None
        return TaskScore(score, success, change, error, extremity, flatness, last.length, last.sums.prompts, ready)

    def _window(self, tallies: list[tuple[int, _Sums]], end: int) -> _Window:
        """Steps (end - length, end]: the shortest, from `window` on, that holds `min_prompts` (or what there is)."""
        found = _Window()
        for step, sums in reversed(tallies):
            if step > end:
                continue
            length = end - step + 1
            if length > self.window and found.sums.prompts >= max(1, self.min_prompts):
                break
            found.length = max(self.window, length)
            found.sums.merge(sums)
        found.full = found.sums.prompts >= max(1, self.min_prompts) and end >= found.length
        return found
