"""The stagnation score on worked examples and simulated series, with the error rates of its decisions."""

from __future__ import annotations

import numpy as np
import pytest

from dppo_mcore.practice.ledger import Group
from dppo_mcore.practice.stagnation import Stagnation


def step(number: int, rates: dict[str, list[int]], trials: int = 8) -> list[Group]:
    """Groups of a step: successes of each prompt by task."""
    return [
        Group(number, f"{task}{i}", task, trials, successes)
        for task, prompts in rates.items()
        for i, successes in enumerate(prompts)
    ]


def simulate(
    curve: np.ndarray, *, tasks: int = 1, prompts: int = 5, seed: int = 0, spread: float = 0.25, **options: object
) -> tuple[int, str]:
    """Feed a curve of mean success (per step) with sampled prompts and answers; returns the step it ends at, and why.

    Prompts differ: a prompt's own success rate is Beta distributed around the curve with standard deviation near
    `spread` at 1/2.
    """
    rng = np.random.default_rng(seed)
    stagnation = Stagnation(**options)  # type: ignore[arg-type]
    strength = 0.25 / spread**2 - 1
    for number, mean in enumerate(curve, 1):
        mean = min(max(mean, 0.001), 0.999)
        rates_TP = rng.beta(mean * strength, (1 - mean) * strength, (tasks, prompts))
        wins_TP = rng.binomial(8, rates_TP)
        stagnation.add(step(number, {f"t{i}": wins_TP[i].tolist() for i in range(tasks)}))
        verdict = stagnation.verdict()
        if verdict.stop:
            return number, verdict.reason
    raise AssertionError("never ended")


def test_worked_example() -> None:
    stagnation = Stagnation(window=2, min_prompts=1, min_steps=1)
    for number, successes in enumerate([4, 4, 6, 6], 1):
        stagnation.add(step(number, {"a": [successes] * 3}))
    task = stagnation.verdict().tasks["a"]
    # p = .75, p before = .5: e = |1.5 - 1| = .5, f = 1 - min(1, .25 / .05) = 0, S = .3 * .5 + .7 * 0.
    assert (task.success, task.change, task.extremity, task.flatness) == (0.75, 0.25, 0.5, 0.0)
    assert task.score == pytest.approx(0.15)
    stagnation = Stagnation(window=1, min_prompts=1, min_steps=1)
    for number, successes in enumerate([50, 52], 1):
        stagnation.add(step(number, {"a": [successes] * 3}, trials=100))
    task = stagnation.verdict().tasks["a"]
    # A change of .02 without any noise: f = 1 - .02 / .05 = .6.
    assert task.flatness == pytest.approx(0.6)
    assert task.score == pytest.approx(0.3 * 0.04 + 0.7 * 0.6)


def test_exactly_flat_at_one_half_stops() -> None:
    """e = 0 and f = 1 give 0.7 exactly, which must reach the threshold."""
    stagnation = Stagnation(window=2, min_prompts=1, min_steps=4)
    for number in range(1, 5):
        stagnation.add(step(number, {"a": [3, 5]}))
        verdict = stagnation.verdict()
        assert verdict.stop == (number == 4)
    assert verdict.score == pytest.approx(0.7)
    assert verdict.reason == "S = 0.70: a 0.70"


def test_the_window_grows_until_it_holds_enough_prompts() -> None:
    stagnation = Stagnation(window=2, min_prompts=30, min_steps=1)
    for number in range(1, 21):
        stagnation.add(step(number, {"a": [3, 5, 4, 4, 4]}))
        task = stagnation.verdict().tasks["a"]
        assert task.ready == (number >= 12)
        assert stagnation.verdict().stop == (number >= 12)
    assert (task.window, task.prompts) == (6, 30)


def test_small_changes_within_noise_count_as_none() -> None:
    rng = np.random.default_rng(0)
    stagnation = Stagnation(window=10, min_prompts=0, min_steps=1)
    for number in range(1, 21):
        stagnation.add(step(number, {"a": rng.binomial(8, 0.5, 5).tolist()}))
    task = stagnation.verdict().tasks["a"]
    assert task.change is not None and task.error is not None
    assert 0 < abs(task.change) < 2 * task.error and task.flatness == 1


def test_aggregates() -> None:
    def fill(aggregate: str) -> Stagnation:
        stagnation = Stagnation(window=2, min_prompts=1, min_steps=1, aggregate=aggregate)  # type: ignore[arg-type]
        for number, rising in enumerate([10, 20, 30, 40], 1):
            stagnation.add(step(number, {"flat": [100, 100], "up": [rising, rising]}, trials=100))
        return stagnation

    mean = fill("mean").verdict()
    assert mean.tasks["flat"].score == 1 and mean.tasks["up"].score == pytest.approx(0.3 * 0.3)
    assert mean.score == pytest.approx((1 + 0.09) / 2) and not mean.stop
    assert not fill("all").verdict().stop
    frozen = fill("freeze").verdict()
    assert frozen.frozen == ("flat",) and not frozen.stop


def test_frozen_tasks_stay_frozen_and_end_the_phase_together() -> None:
    stagnation = Stagnation(window=1, min_prompts=1, min_steps=1, aggregate="freeze")
    stagnation.add(step(1, {"a": [4], "b": [0]}))
    stagnation.add(step(2, {"a": [4], "b": [8]}))
    assert stagnation.verdict().frozen == ("a",)
    stagnation.add(step(3, {"b": [8]}))
    verdict = stagnation.verdict()
    assert verdict.frozen == ("a", "b") and verdict.stop


def test_min_and_max_steps() -> None:
    flat = np.full(100, 0.5)
    assert simulate(flat, prompts=200, min_steps=40)[0] == 40
    rising = np.linspace(0.05, 0.95, 100)
    ended, reason = simulate(rising, prompts=200, max_steps=60)
    assert ended == 60 and reason.startswith("after 60 steps at most, S = ")


@pytest.mark.parametrize("seed", range(3))
def test_rising_flat_saturated_and_oscillating(seed: int) -> None:
    steps = np.arange(1, 501)
    many = {"prompts": 100, "seed": seed, "max_steps": 500}
    # Rising by 0.1 over a window for 100 steps, then flat: ends after the rise, within three windows of its end.
    rising = np.minimum(0.1 + 0.01 * steps / 1.25, 0.9)
    ended, _ = simulate(rising, **many)  # type: ignore[arg-type]
    assert 85 <= ended <= 130
    assert simulate(np.full(500, 0.99), **many)[0] <= 25  # type: ignore[arg-type]
    assert simulate(np.full(500, 0.02), **many)[0] <= 25  # type: ignore[arg-type]
    # A swing without a trend goes nowhere. One faster than the window ends at once; one as slow as two windows looks
    # like rises and falls, and ends when two windows happen to average the same, or at the bound.
    assert simulate(0.5 + 0.2 * np.sin(2 * np.pi * steps / 5), **many)[0] <= 25  # type: ignore[arg-type]
    assert simulate(0.5 + 0.2 * np.sin(2 * np.pi * steps / 20), **many)[0] <= 500  # type: ignore[arg-type]
    # The fast swing on a rise does not end before the rise does.
    rising_swing = np.minimum(0.1 + 0.008 * steps, 0.9) + 0.1 * np.sin(2 * np.pi * steps / 5)
    assert simulate(rising_swing, **many)[0] >= 90  # type: ignore[arg-type]


def test_error_rates() -> None:
    """Six tasks, 5 prompts each a step, as in a small run: how often the decision is wrong.

    Flat from the start: should end about as soon as two full windows are there (160 steps of 5 prompts).
    Rising by 25 points a hundred steps over the whole run: must not end before max_steps.
    """
    runs = 20
    flat = [simulate(np.full(400, 0.4), tasks=6, seed=s, max_steps=400)[0] for s in range(runs)]
    rising = [simulate(np.linspace(0.05, 0.95, 360), tasks=6, seed=s, max_steps=360)[0] for s in range(runs)]
    late = np.mean([ended > 200 for ended in flat])
    early = np.mean([ended < 360 for ended in rising])
    assert min(flat) >= 160
    assert late <= 0.05, f"flat runs not ended by step 200: {late:.0%}"
    assert early <= 0.05, f"rising runs ended early: {early:.0%}"


def test_without_lengthening_noise_would_hide_flatness() -> None:
    """The plain rule at 5 prompts a step and w = 10 sits far under the threshold on a truly flat run."""
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(200):
        now, before = (rng.binomial(8, rng.beta(1.5, 1.5, 50)).mean() / 8 for _ in range(2))
        scores.append(0.3 * abs(2 * now - 1) + 0.7 * (1 - min(1, abs(now - before) / 0.05)))
    assert np.mean(scores) < 0.4


def test_a_task_too_rare_to_judge_does_not_hold_the_run() -> None:
    stagnation = Stagnation(window=5, min_prompts=50, min_steps=10, max_steps=300)
    for number in range(1, 301):
        groups = step(number, {f"t{i}": [4] * 10 for i in range(5)})
        if number % 50 == 1:
            groups += step(number, {"rare": [4]})
        stagnation.add(groups)
        verdict = stagnation.verdict()
        if verdict.stop:
            break
    assert not verdict.tasks["rare"].ready
    assert number == 300  # five tasks at exactly .7 and one unknown stay under .7: the bound ends it
    assert verdict.reason.startswith("after 300 steps")


def test_a_task_with_nothing_left_to_draw_does_not_hold_the_run() -> None:
    """It was mastered before it filled two windows, and would count as not flat for ever."""

    def run(exhausted: frozenset[str]) -> tuple[int, str]:
        stagnation = Stagnation(window=5, min_prompts=50, min_steps=10, max_steps=300)
        for number in range(1, 301):
            groups = step(number, {"a": [4] * 10})
            stagnation.add(groups + step(number, {"mastered": [8] * 10}) if number <= 6 else groups)
            stagnation.exhausted = exhausted if number >= 6 else frozenset()
            verdict = stagnation.verdict()
            if verdict.stop:
                return number, verdict.reason
        raise AssertionError("never ended")

    assert run(frozenset({"mastered"})) == (10, "S = 0.85: a 0.70, mastered 1.00")
    assert run(frozenset())[0] == 300


def test_empty_and_single_sample() -> None:
    stagnation = Stagnation(max_steps=3)
    stagnation.add([])
    assert stagnation.verdict().score == 0
    stagnation.add(step(2, {"a": [8]}))
    stagnation.add([])
    assert stagnation.verdict().stop


def test_rebuilt_from_its_groups() -> None:
    rng = np.random.default_rng(3)
    whole = Stagnation(window=3, min_prompts=10, min_steps=2, aggregate="freeze")
    groups = []
    for number in range(1, 30):
        new = step(number, {t: rng.binomial(8, 0.5, 4).tolist() for t in "abc"})
        groups += new
        whole.add(new)
        verdict = whole.verdict()
    again = Stagnation(window=3, min_prompts=10, min_steps=2, aggregate="freeze").from_groups(groups)
    assert again.verdict() == verdict


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ValueError, match="rl_max_steps"):
        Stagnation(max_steps=0)
    with pytest.raises(ValueError, match="stagnation_window"):
        Stagnation(window=0)
