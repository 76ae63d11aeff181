"""Scoring in worker processes with a time limit: a scorer that hangs is killed, its answer gets 0, the rest go on."""

from __future__ import annotations

import os
import pickle
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType

from dppo_mcore.rewards.registry import load_objectives
from dppo_mcore.rewards.scoring import DEFAULT_RUBRIC, Rubric, Score, failed, score
from dppo_mcore.rewards.worker import LENGTH, send
from dppo_mcore.types import Rollout, Sample, ScoredRollout

CHUNK = 32
"""Answers handed to a worker at once."""
START_SECONDS = 120.0
"""Time for a worker to start and load the objectives."""

Task = tuple[Sample, str]


class _Worker:
    def __init__(self, rubric: Rubric, objectives: str) -> None:
        package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # The worker needs no GPU, and no threads of a linear algebra library.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dppo_mcore.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.assigned: deque[int] = deque()
        self.deadline = time.monotonic() + START_SECONDS
        self.buffer = bytearray()
        send(self.stdin, (rubric, objectives))

    def messages(self) -> Iterable[object]:
        """Whole messages among the bytes that arrived; raises EOFError where the worker is gone."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            raise EOFError
        self.buffer += data
        while len(self.buffer) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack(self.buffer[: LENGTH.size])[0]
            if len(self.buffer) < end:
                return
            body, self.buffer = bytes(self.buffer[LENGTH.size : end]), self.buffer[end:]
            yield pickle.loads(body)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


class RewardPool:
    """`score` many answers in `workers` processes; 0 workers score in place, without a time limit."""

    def __init__(
        self,
        workers: int = 2,
        *,
        timeout_s: float = 10.0,
        rubric: Rubric = DEFAULT_RUBRIC,
        objectives: str = "",
    ) -> None:
        self.rubric = rubric
        self.timeout_s = timeout_s
        self._objectives = objectives
        self._workers: list[_Worker] = []
        self.restarts = 0
        """Workers killed and started anew so far."""
        load_objectives(objectives)  # a broken file is an error at start, in this process
        self._workers = [_Worker(rubric, objectives) for _ in range(workers)]

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def score_rollouts(self, samples: Sequence[Sample], rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Rollouts with their scores; `samples[i]` is the question of `rollouts[i]`."""
        scores = self.score([(s, r.text) for s, r in zip(samples, rollouts, strict=True)])
        return [one.of(rollout) for one, rollout in zip(scores, rollouts, strict=True)]

    def score(self, tasks: Sequence[Task]) -> list[Score]:
        """Scores in the order of the tasks."""
        if not self._workers:
            return [score(sample, text, self.rubric) for sample, text in tasks]
        results: list[Score | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            while waiting or any(worker.assigned for worker in self._workers):
                for worker in self._workers:
                    self._feed(worker, waiting, tasks, len(tasks))
                busy = [worker for worker in self._workers if worker.assigned or not worker.ready]
                pause = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
                for key, _ in selector.select(pause):
                    self._take(key.data, results, waiting, selector)
                now = time.monotonic()
                for worker in list(self._workers):
                    if (worker.assigned or not worker.ready) and now >= worker.deadline:
                        self._replace(worker, f"took longer than {self.timeout_s:g} s", results, waiting, selector)
        return [result if result is not None else failed("not scored") for result in results]

    def _feed(self, worker: _Worker, waiting: deque[int], tasks: Sequence[Task], total: int) -> None:
        if not worker.ready or worker.assigned or not waiting:
            return
        size = max(1, min(CHUNK, total // (2 * len(self._workers))))
        chunk = [waiting.popleft() for _ in range(min(size, len(waiting)))]
        worker.assigned.extend(chunk)
        worker.deadline = time.monotonic() + self.timeout_s
        try:
            send(worker.stdin, [tasks[index] for index in chunk])
        except BrokenPipeError:
            pass  # its end shows as EOF on the other pipe

    def _take(
        self, worker: _Worker, results: list[Score | None], waiting: deque[int], selector: selectors.BaseSelector
    ) -> None:
        try:
            for message in worker.messages():
                if not worker.ready:
                    if message is not None:
                        raise RuntimeError(f"objectives {self._objectives!r} don't load in a worker: {message}")
                    worker.ready = True
                elif isinstance(message, Score):
                    results[worker.assigned.popleft()] = message
                    worker.deadline = time.monotonic() + self.timeout_s
        except EOFError:
            self._replace(worker, "ended its worker process", results, waiting, selector)

    def _replace(
        self,
        worker: _Worker,
        what: str,
        results: list[Score | None],
        waiting: deque[int],
        selector: selectors.BaseSelector,
    ) -> None:
        """Kill a worker; the answer it was at gets 0, those it hadn't begun go back to the queue."""
        if not worker.ready:
            raise RuntimeError(f"a reward worker did not start within {START_SECONDS:g} s or ended at its start")
        if worker.assigned:
            results[worker.assigned.popleft()] = failed(f"scorer {what}")
        waiting.extendleft(reversed(worker.assigned))
        selector.unregister(worker.stdout)
        worker.kill()
        self.restarts += 1
        fresh = _Worker(self.rubric, self._objectives)
        self._workers[self._workers.index(worker)] = fresh
        selector.register(fresh.stdout, selectors.EVENT_READ, fresh)
