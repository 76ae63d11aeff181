"""Which answers are still owed, which are being made, and what went wrong with them. No engine, no torch.

Every answer is owed once. It leaves the queue only by being finished, so a lost engine loses nothing, and an answer
that arrives twice (a resent request whose first copy was only slow) is taken once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dppo_mcore.rollout.base import EngineError, GenerationRequest


@dataclass(slots=True)
class Job:
    """One answer owed."""

    request: GenerationRequest
    position: int
    """Of its request in the call to `generate`."""
    index: int
    attempts: int = 0
    sent_at: float = 0.0
    rid: str = ""


@dataclass
class Queue:
    """Jobs by state."""

    requests: Sequence[GenerationRequest]
    max_in_flight: int
    max_attempts: int
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[str, Job] = field(default_factory=dict)
    finished: int = 0

    def __post_init__(self) -> None:
        owed: set[tuple[str, int]] = set()
        for position, request in enumerate(self.requests):
            for index in request.indices:
                if (request.sample_id, index) in owed:
                    raise EngineError(f"sample {request.sample_id}: answer {index} is asked for twice in one call")
                owed.add((request.sample_id, index))
                self.waiting.append(Job(request, position, index))
        self._left = [request.n for request in self.requests]

    @property
    def done(self) -> bool:
        """Whether every answer was delivered."""
        return not self.waiting and not self.running

    def next(self) -> Job | None:
        """The job to send now; None when nothing waits or enough is in flight."""
        if not self.waiting or len(self.running) >= self.max_in_flight:
            return None
        return self.waiting[0]

    def sent(self, job: Job, rid: str, now: float) -> None:
        """`job`, the head of the waiting ones, went out as `rid`."""
        self.waiting.popleft()
        job.rid, job.sent_at = rid, now
        job.attempts += 1
        self.running[rid] = job

    def finish(self, rid: str) -> Job | None:
        """The job `rid` answers; None if it was resent under another id meanwhile."""
        job = self.running.pop(rid, None)
        if job is not None:
            self.finished += 1
            self._left[job.position] -= 1
        return job

    def prompt_done(self, job: Job) -> bool:
        """Whether nothing of this job's request is owed any more."""
        return self._left[job.position] == 0

    def resend(self, rids: Iterable[str], reason: str, counted: bool = True) -> list[Job]:
        """Put running jobs back, first in line; an error once one has had all its attempts.

        `counted=False` for jobs that were only victims of an engine's end, which has its own bound.
        """
        jobs = [self.running.pop(rid) for rid in rids]
        for job in reversed(jobs):
            if not counted:
                job.attempts -= 1
            if job.attempts > self.max_attempts:
                raise EngineError(
                    f"sample {job.request.sample_id}, answer {job.index}: no result after {job.attempts} attempts; "
                    f"the last one {reason}"
                )
            self.waiting.appendleft(job)
        return jobs

    def overdue(self, now: float, limit_s: float) -> list[str]:
        """Ids running for longer than `limit_s`."""
        return [rid for rid, job in self.running.items() if now - job.sent_at > limit_s]

    def abort_waiting(self) -> list[Job]:
        """Jobs never sent, or put back, leave unanswered."""
        jobs = list(self.waiting)
        self.waiting.clear()
        for job in jobs:
            self.finished += 1
            self._left[job.position] -= 1
        return jobs
