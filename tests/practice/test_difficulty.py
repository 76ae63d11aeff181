"""The buffer and the draws: what is dropped, capped and weighed, and that a resumed run draws the same."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import numpy as np
import pytest

from dppo_mcore.practice.difficulty import Draw, make_buffer, practice_weight
from dppo_mcore.practice.ledger import BufferRow, Group
from dppo_mcore.practice.stagnation import Stagnation
from dppo_mcore.types import Sample

TASKS = ("counting", "planning", "success")


def pool(size: int) -> list[Sample]:
    return [Sample(f"s{i:04}", TASKS[i % 3], (), dimension=f"d{i % 4}") for i in range(size)]


def statuses(rows: list[BufferRow]) -> Counter[str]:
    return Counter(row.status for row in rows)


def test_weight_is_the_expected_variance() -> None:
    """Against the integral of p(1-p) over the posterior of a uniform prior."""
    p_N = (np.arange(100_000) + 0.5) / 100_000
    for trials, successes in ((4, 0), (4, 2), (8, 1), (0, 0)):
        posterior_N = p_N**successes * (1 - p_N) ** (trials - successes)
        expected = (posterior_N * p_N * (1 - p_N)).sum() / posterior_N.sum()
        assert practice_weight(trials, successes) == pytest.approx(expected, rel=1e-4)


def test_mastered_dropped_intractable_capped() -> None:
    samples = [Sample(f"s{i}", "counting", ()) for i in range(100)]
    counts = {f"s{i}": (4, 4 if i < 20 else 0 if i < 60 else 2) for i in range(100)}
    rows = make_buffer(samples, counts)
    # 40 in the middle; 25% of the buffer is a third of that: 13 intractable.
    assert statuses(rows) == {"mastered": 20, "kept": 40, "intractable": 13, "over-cap": 27}
    assert statuses(make_buffer(samples, counts, intractable_share=0.0))["intractable"] == 0
    assert statuses(make_buffer(samples, counts, anchor_share=0.1))["anchor"] == 5
    assert statuses(make_buffer(samples, counts, intractable_share=1.0))["over-cap"] == 0


def test_the_cap_is_per_task() -> None:
    samples = [Sample(f"{task}{i}", task, ()) for task in "ab" for i in range(40)]
    counts = {s.id: (4, 0 if s.objective == "a" and int(s.id[1:]) >= 9 else 1) for s in samples}
    rows = make_buffer(samples, counts)
    assert statuses([r for r in rows if r.sample_id[0] == "a"]) == {"kept": 9, "intractable": 3, "over-cap": 28}
    assert statuses([r for r in rows if r.sample_id[0] == "b"]) == {"kept": 40}


def test_least_recently_tried_first() -> None:
    samples = [Sample(f"s{i}", "a", ()) for i in range(20)]
    counts = {f"s{i}": (4, 0 if i < 10 else 2) for i in range(20)}
    tries = {f"s{i}": 100 - i for i in range(10)}
    rows = make_buffer(samples, counts, last_tries=tries)
    assert [r.sample_id for r in rows if r.status == "intractable"] == ["s7", "s8", "s9"]


def test_a_task_that_is_all_intractable_is_still_tried() -> None:
    samples = [Sample(f"s{i}", "a", ()) for i in range(8)]
    rows = make_buffer(samples, {s.id: (4, 0) for s in samples})
    assert statuses(rows) == {"intractable": 8}


def test_samples_never_rolled_out_are_not_in_the_buffer() -> None:
    assert make_buffer(pool(5), {"s0001": (4, 1)}) == [BufferRow("s0001", "kept", 4, 1)]


def test_draws_follow_the_weights() -> None:
    samples = [Sample(f"s{i}", "a", ()) for i in range(400)]
    rows = [BufferRow(f"s{i}", "kept", 8, 1 if i < 200 else 4) for i in range(400)]
    draw = Draw(samples, rows, seed=0)
    times = Counter(name for _ in range(1000) for name in draw.draw(8))
    rare, often = (np.mean([times[f"s{i}"] for i in span]) for span in (range(200), range(200, 400)))
    assert often / rare == pytest.approx(practice_weight(8, 4) / practice_weight(8, 1), rel=0.03)
    # Systematic sampling: within a stratum of equal weights counts hardly differ.
    assert np.std([times[f"s{i}"] for i in range(200, 400)]) < 2


def test_every_step_is_stratified() -> None:
    samples = pool(360)
    rows = [BufferRow(s.id, "kept", 4, 2) for s in samples]
    draw = Draw(samples, rows, seed=1)
    by_id = {s.id: s for s in samples}
    for _ in range(12):
        mix = Counter(by_id[name].objective for name in draw.draw(30))
        assert all(6 <= mix[task] <= 14 for task in TASKS), mix
    assert draw.epoch == 0
    assert len(draw.draw(30)) == 30 and draw.epoch == 1


def test_all_different_within_a_step() -> None:
    samples = pool(12)
    draw = Draw(samples, [BufferRow(s.id, "kept", 4, i % 3 + 1) for i, s in enumerate(samples)], seed=2)
    for wanted in (12, 11, 12, 7, 12, 100):
        names = draw.draw(wanted)
        assert len(set(names)) == len(names) == min(wanted, 12)


def test_rescored_as_training_goes() -> None:
    samples = pool(3)
    draw = Draw(samples, [BufferRow(s.id, "kept", 4, 2) for s in samples], seed=0)
    draw.update([Group(1, "s0000", "counting", 8, 8)])
    assert "s0000" not in draw.drawable()
    assert len(draw.draw(3)) == 2 and draw.exhausted() == {"counting"}
    draw.update([Group(2, "s0001", "planning", 8, 8), Group(2, "s0002", "success", 8, 8)])
    assert draw.draw(3) == []


def test_anchors_stay() -> None:
    samples = pool(2)
    draw = Draw(samples, [BufferRow("s0000", "anchor", 4, 4), BufferRow("s0001", "kept", 4, 2)], seed=0)
    draw.update([Group(1, "s0000", "counting", 8, 8)])
    assert sorted(draw.draw(2)) == ["s0000", "s0001"]


def test_frozen_objectives_are_not_drawn() -> None:
    samples = pool(30)
    draw = Draw(samples, [BufferRow(s.id, "kept", 4, 2) for s in samples], seed=0)
    draw.draw(5)
    draw.freeze(["counting", "planning"])
    names = draw.draw(30)
    assert len(names) == 10 and {samples[int(n[1:])].objective for n in names} == {"success"}


def test_a_task_mastered_from_the_start_is_not_exhausted() -> None:
    samples = pool(2)
    draw = Draw(samples, [BufferRow("s0000", "mastered", 4, 4), BufferRow("s0001", "kept", 4, 2)], seed=0)
    assert draw.exhausted() == frozenset()


def test_random_is_a_permutation_of_the_pool() -> None:
    samples = pool(50)
    draw = Draw(samples, [], seed=3, sampling="random")
    epochs = [[name for _ in range(5) for name in draw.draw(10)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(s.id for s in samples) for epoch in epochs)
    assert epochs[0] != epochs[1]
    draw.update([Group(1, name, "counting", 8, 8) for name in epochs[0]])
    assert len(draw.draw(10)) == 10


def test_the_same_seed_draws_the_same_and_replay_goes_on() -> None:
    samples = pool(200)
    rng = np.random.default_rng(0)
    rows = make_buffer(samples, {s.id: (4, int(rng.integers(0, 5))) for s in samples})
    options = {"min_prompts": 20, "window": 2, "min_steps": 3, "aggregate": "freeze"}
    first, stagnation = Draw(samples, rows, seed=5), Stagnation(**options)
    groups: list[Group] = []
    by_id = {s.id: s for s in samples}
    replayed = 0
    for number in range(40):
        names = first.draw(16)
        new = [Group(number, n, by_id[n].objective, 8, int(rng.integers(0, 9))) for n in sorted(names)]
        groups += new
        stagnation.add(new, first.update(new))
        first.freeze(stagnation.verdict().frozen)
        if stagnation.verdict().stop:
            break
        again, other = Draw(samples, rows, seed=5), Stagnation(**options)
        again.replay(groups, 16, other, steps=number + 1)
        assert other.verdict() == stagnation.verdict()
        assert again.draw(16) == deepcopy(first).draw(16)
        replayed += 1
    assert replayed > 5 and stagnation.frozen
    assert Draw(samples, rows, seed=6).draw(16) != Draw(samples, rows, seed=5).draw(16)


def test_a_step_without_groups_is_replayed_too() -> None:
    """All of its samples were damaged: the ledger has nothing of it, the draw went on."""
    samples = pool(60)
    rows = [BufferRow(s.id, "kept", 4, 2) for s in samples]
    first, stagnation = Draw(samples, rows, seed=0), Stagnation(max_steps=4)
    groups: list[Group] = []
    for number in range(4):
        names = first.draw(8)
        new = [] if number in (1, 3) else [Group(number, n, "counting", 8, 3) for n in names]
        groups += new
        stagnation.add(new, first.update(new))
    again, other = Draw(samples, rows, seed=0), Stagnation(max_steps=4)
    again.replay(groups, 8, other, steps=4)
    assert again.draw(8) == first.draw(8)
    assert other.verdict() == stagnation.verdict() and other.verdict().stop


def test_peek_is_the_next_draw_unless_answers_change_it() -> None:
    """It takes nothing, knows of what was mastered or frozen since, and does not look past an epoch."""
    rows = [BufferRow(s.id, "kept", 4, 2) for s in pool(60)]
    draw, blind = (Draw(pool(60), rows, seed=3) for _ in range(2))
    for step in range(20):
        expected, epoch = draw.peek(16), draw.epoch
        names = draw.draw(16)
        assert names == blind.draw(16)
        assert names == expected or (draw.epoch > epoch and names[: len(expected)] == expected)
        groups = [
            Group(step, name, TASKS[int(name[1:]) % 3], 8, 8 if place else 3) for place, name in enumerate(draw.peek(2))
        ]
        draw.update(groups)
        blind.update(groups)
        if step == 10:
            draw.freeze(["planning"])
            blind.freeze(["planning"])
        mastered = {group.sample_id for group in groups[1:]}
        assert not mastered & set(draw.peek(16))
        assert step < 10 or all(int(name[1:]) % 3 != TASKS.index("planning") for name in draw.peek(16))
