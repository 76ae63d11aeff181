"""Owed answers: none lost, none counted twice, retries bounded."""

from __future__ import annotations

import random

import pytest

from dppo_mcore.rollout.base import EngineError, GenerationRequest
from dppo_mcore.rollout.jobs import Queue
from dppo_mcore.types import Prompt, Sample


def request(name: str, n: int, first_index: int = 0) -> GenerationRequest:
    """n answers to a prompt of one token."""
    return GenerationRequest(name, Prompt(Sample(name, "exact", ()), (1,)), n, first_index)


def send(queue: Queue, rid: str) -> None:
    """Send the next job as `rid`."""
    job = queue.next()
    assert job is not None
    queue.sent(job, rid, 0.0)


def test_every_answer_is_owed_once() -> None:
    """Indices count from first_index; asking twice for one answer is an error that names it."""
    queue = Queue([request("a", 2, 3), request("b", 1)], 8, 2)
    assert [(job.request.sample_id, job.index) for job in queue.waiting] == [("a", 3), ("a", 4), ("b", 0)]
    with pytest.raises(EngineError, match="sample a: answer 3 is asked for twice"):
        Queue([request("a", 2, 2), request("a", 1, 3)], 8, 2)


def test_in_flight_is_bounded() -> None:
    """No more than max_in_flight run at once."""
    queue = Queue([request("a", 5)], 2, 2)
    send(queue, "1")
    send(queue, "2")
    assert queue.next() is None
    queue.finish("1")
    assert queue.next() is not None


def test_a_late_first_copy_is_not_counted() -> None:
    """After a resend only the new id counts."""
    queue = Queue([request("a", 1)], 2, 2)
    send(queue, "old")
    queue.resend(["old"], "was slow")
    send(queue, "new")
    assert queue.finish("old") is None
    assert queue.finish("new") is not None
    assert queue.done and queue.finished == 1


def test_attempts_are_bounded_and_the_error_names_the_answer() -> None:
    """max_attempts resends, then one clear error."""
    queue = Queue([request("a", 1)], 2, 1)
    send(queue, "1")
    queue.resend(["1"], "was slow")
    send(queue, "2")
    with pytest.raises(EngineError, match="sample a, answer 0: no result after 2 attempts; the last one was slow"):
        queue.resend(["2"], "was slow")


def test_an_engines_end_costs_no_attempt() -> None:
    """Jobs that ran when their engine died may be sent as often as before."""
    queue = Queue([request("a", 1)], 2, 1)
    for number in range(9):
        send(queue, str(number))
        queue.resend([str(number)], "lost its engine", counted=False)
    assert len(queue.waiting) == 1


def test_any_course_of_events_delivers_each_answer_once() -> None:
    """Random finishes, losses and late copies over 200 courses."""
    for seed in range(200):
        dice = random.Random(seed)
        queue = Queue([request("a", 4), request("b", 3, 2), request("c", 1)], 3, 10_000)
        seen: list[tuple[str, int]] = []
        old: list[str] = []
        number = 0
        while not queue.done:
            while (job := queue.next()) is not None:
                number += 1
                queue.sent(job, str(number), 0.0)
            fate = dice.random()
            if fate < 0.3:
                lost = dice.sample(sorted(queue.running), dice.randint(1, len(queue.running)))
                old += lost
                queue.resend(lost, "lost", counted=False)
            elif fate < 0.4 and old:
                assert queue.finish(dice.choice(old)) is None
            else:
                job = queue.finish(dice.choice(sorted(queue.running)))
                assert job is not None
                seen.append((job.request.sample_id, job.index))
        assert sorted(seen) == sorted([*(("a", i) for i in range(4)), *(("b", i) for i in range(2, 5)), ("c", 0)])
