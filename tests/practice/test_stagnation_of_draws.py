"""The stagnation score where what is drawn changes with the answers: simulated phases through the real draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from dppo_mcore.practice.difficulty import Draw, make_buffer
from dppo_mcore.practice.ledger import BufferRow, Group
from dppo_mcore.practice.stagnation import Stagnation, Standing
from dppo_mcore.types import Sample

TASKS = 6


@dataclass
class Course:
    """What became of a simulated phase."""

    ended: int
    ready: int
    """The first step with two full windows of every task."""
    drawn: list[float] = field(default_factory=list)
    """Mean success of the prompts drawn at each step."""
    true: list[float] = field(default_factory=list)
    """Mean success of all samples that could be drawn at first, by the model as it then is."""
    found: list[float] = field(default_factory=list)
    """The score's success over the last window, mean of the tasks."""


def practise(
    slope: float,
    seed: int,
    *,
    until: int = 10**6,
    counted: bool = True,
    sampling: Literal["difficulty", "random"] = "difficulty",
    samples: int = 2000,
    prompts: int = 64,
    steps: int = 300,
    **options: Any,
) -> Course:
    """A phase of a model whose log-odds of success change by `slope` a step, `until` some step, with default options.

    Samples differ by a standard deviation of 1.5. `counted` as the trainer does, else every group for itself.
    """
    rng = np.random.default_rng(seed)
    odds_N = rng.normal(-max(0.0, slope * 120), 1.5, samples)

    def rates(step: int) -> np.ndarray:
        return 1 / (1 + np.exp(-odds_N - slope * min(step, until)))

    pool = [Sample(f"s{i:04}", f"t{i % TASKS}", ()) for i in range(samples)]
    place = {sample.id: number for number, sample in enumerate(pool)}
    wins_N = rng.binomial(4, rates(0))
    rows = make_buffer(pool, {sample.id: (4, int(wins_N[n])) for n, sample in enumerate(pool)}, seed=seed)
    draw, stagnation = Draw(pool, rows, seed=seed, sampling=sampling), Stagnation(**options)
    began_N = np.array([place[name] for name in draw.drawable()])
    course = Course(steps + 1, steps + 1)
    for step in range(steps):
        names = draw.draw(prompts)
        wins_P = rng.binomial(8, rates(step)[[place[name] for name in names]])
        groups = [
            Group(step, name, pool[place[name]].objective, 8, int(wins))
            for name, wins in zip(names, wins_P, strict=True)
        ]
        standings = draw.update(groups)
        stagnation.add(groups, standings if counted else None)
        stagnation.exhausted = draw.exhausted()
        verdict = stagnation.verdict()
        course.drawn.append(float(wins_P.mean()) / 8)
        course.true.append(float(rates(step)[began_N].mean()))
        course.found.append(float(np.mean([task.success for task in verdict.tasks.values()])))
        if all(task.ready for task in verdict.tasks.values()):
            course.ready = min(course.ready, step + 1)
        if verdict.stop:
            course.ended = min(course.ended, step + 1)
            if "max_steps" not in options:
                break
    return course


def test_worked_example() -> None:
    """Four samples: one is mastered, of the others the one drawn half as often as the average stands for two."""
    stagnation = Stagnation(window=1, min_prompts=1, min_steps=1)
    groups = [Group(0, "a", "t", 8, 2), Group(0, "b", "t", 8, 6)]
    stagnation.add(groups, {"a": Standing(2.0, 0.75, 0.225), "b": Standing(1.0, 0.75, 0.225)})
    task = stagnation.verdict().tasks["t"]
    # (2 * 2/8 + 6/8) / 3 = 5/12 of the three that are drawn, 0.9 of the one that left.
    assert task.success == pytest.approx(0.75 * 5 / 12 + 0.25 * 0.9)
    assert task.extremity == pytest.approx(2 * task.success - 1)


def test_what_a_group_stands_for() -> None:
    pool = [Sample(f"s{i}", "t", ()) for i in range(4)]
    rows = [BufferRow(f"s{i}", "kept", 4, wins) for i, wins in enumerate((2, 2, 3, 3))]
    draw = Draw(pool, rows, seed=0)
    names = draw.draw(4)
    while len(names) < 4:
        names = draw.draw(4)
    wins = {"s0": 8, "s1": 4, "s2": 6, "s3": 6}
    stands = draw.update([Group(0, name, "t", 8, wins[name]) for name in names])
    # The practice weights are 9/42 and 8/42, their mean 8.5/42.
    assert stands["s0"] == Standing(pytest.approx(8.5 / 9), 1.0, 0.0)
    assert stands["s3"].weight == pytest.approx(8.5 / 8)
    later = draw.update([Group(1, "s1", "t", 8, 4)])["s1"]
    # s0 was mastered: 9/10 of one in four.
    assert (later.drawn, later.left) == (0.75, pytest.approx(0.9 / 4))
    assert Draw(pool, rows, seed=0, sampling="random").update([Group(0, "s0", "t", 8, 8)]) == {}


def test_success_is_that_of_all_samples_however_they_are_drawn() -> None:
    """While a model gets better the drawn stay near the middle; while it stays as it is theirs falls."""
    window = 38
    for slope, rise, hidden in ((0.01, 0.4, 0.15), (0.0, -1e-9, 0.02)):
        course = practise(slope, 0, max_steps=10**6)
        true, drawn = (float(np.mean(series[-window:])) for series in (course.true, course.drawn))
        assert true - course.true[0] >= rise and true - drawn > hidden
        assert abs(course.found[-1] - true) < 0.04


def test_error_rates_of_difficulty_aware_phases() -> None:
    """Six tasks, 64 prompts a step of 2000 samples, default options.

    Rising by about 15 points a hundred steps: must not end. Flat: should end soon after two full windows are there.
    Each group for itself, most rising phases would end.
    """
    seeds = range(6)
    rising = [practise(0.01, seed) for seed in seeds]
    assert [course.ended for course in rising] == [301] * len(rising)
    alone = [practise(0.01, seed, counted=False).ended for seed in seeds]
    assert np.mean([ended < 301 for ended in alone]) >= 0.5, alone
    flat = [practise(0.0, seed) for seed in seeds]
    assert all(course.ended <= course.ready + 40 for course in flat)
