"""Prompts decoded ahead of the training loop by worker processes, in bounded memory."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dppo_mcore.config import DataConfig
from dppo_mcore.data import errors
from dppo_mcore.data.cache import BoundedCache
from dppo_mcore.data.errors import DataError, MediaError
from dppo_mcore.data.frames import plan_key
from dppo_mcore.data.messages import Answer, Request, Setup, Task, read_message, read_pixels, write_message
from dppo_mcore.data.patches import normalise
from dppo_mcore.data.quarantine import Quarantine
from dppo_mcore.data.qwen import Processor
from dppo_mcore.data.worker import plan_request
from dppo_mcore.types import Prompt, PromptMedia

# A clip that takes longer than this has hung its decoder.
TASK_SECONDS = 300.0
KILL_WAIT_SECONDS = 10.0
PLANNED_TOKENS = 1 << 20
"""Tokens of planned prompts kept for when they come again: some 40 MB."""


class PromptSource:
    """Makes prompts from requests. Use from one thread; close it, or let the process end.

    `take`, `stream` and `plan` give None for a damaged sample, which is then in the quarantine, and for one that is too
    long for the request, which is there for requests of this use. At most `decode_ahead`
    prompts are decoded and not yet taken.
    """

    def __init__(
        self,
        model_dir: str | Path,
        data: DataConfig,
        device: torch.device | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.processor = Processor(model_dir, data, device)
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self.counts: Counter[str] = Counter()
        self.wait_seconds = 0.0
        self._ahead = max(data.decode_ahead, 1)
        self._planned: BoundedCache[Prompt] = BoundedCache(PLANNED_TOKENS, lambda prompt: len(prompt.token_ids))
        self._backlog: OrderedDict[Hashable, Request] = OrderedDict()
        self._pending: OrderedDict[Hashable, Future[tuple[Answer, list[Tensor], list[Tensor]]]] = OrderedDict()
        self._plans: dict[Hashable, Future[tuple[Answer, list[Tensor], list[Tensor]]]] = {}
        setup = Setup(str(model_dir), replace(data, media_cache_mib=0), str(device or "cpu"))
        self._pool = _WorkerPool(setup, data.data_workers, self.processor) if data.data_workers else None

    def prefetch(self, requests: Iterable[Request]) -> None:
        """Announce requests that will be taken, in this order."""
        for request in requests:
            if request.key not in self._pending:
                self._backlog.setdefault(request.key, request)
        self._pump()

    def take(self, request: Request) -> Prompt | None:
        """The decoded prompt; waits for it where it isn't ready."""
        self._backlog.pop(request.key, None)
        future = self._pending.pop(request.key, None)
        if self.quarantine.of(request.sample, request.use):
            prompt = None
        elif future is None and (self._pool is None or self.processor.holds(request.sample, request.horizon)):
            prompt = self._here(request)
        else:
            if future is None:
                assert self._pool is not None
                future = self._pool.submit(Task(_light(request)))
            prompt = self._finish(request, future)
        self._pump()
        return prompt

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Prompt | None]]:
        """Requests with their prompts, in order; further ones are being decoded meanwhile."""
        source = iter(requests)
        window: deque[Request] = deque()

        def refill() -> None:
            while len(window) <= self._ahead and (request := next(source, None)) is not None:
                window.append(request)
                self.prefetch([request])

        def prompts() -> Iterator[tuple[Request, Prompt | None]]:
            try:
                while window:
                    request = window.popleft()
                    refill()
                    yield request, self.take(request)
            finally:
                self._forget(window)

        refill()
        return prompts()

    def plan_ahead(self, requests: Iterable[Request]) -> None:
        """Start planning (no decoding) of requests whose `plan` will be asked for."""
        if self._pool is None:
            return
        for request in requests:
            if request.key not in self._plans and not self.knows([request]):
                self._plans[request.key] = self._pool.submit(Task(_light(request), pixels=False))

    def knows(self, requests: Iterable[Request]) -> bool:
        """Whether every request can be planned without touching a file, or is known to be damaged."""
        plans = self.processor.plans
        return all(
            self.quarantine.of(request.sample, request.use) is not None
            or all((media, request.horizon) in plans for media in request.sample.media)
            for request in requests
        )

    def plan(self, request: Request) -> Prompt | None:
        """The prompt with its frame plans, nothing decoded; None for a damaged or too long one."""
        future = self._plans.pop(request.key, None)
        if self.quarantine.of(request.sample, request.use):
            return None
        if future is None:
            try:
                return self._plan_here(request)
            except DataError as error:
                self._damaged(request, error)
                return None
        answer, _, _ = self._wait(future)
        return self._accept(request, answer)

    def metrics(self) -> dict[str, float]:
        """Counts since the start: clips by backend, refusals, quarantined samples, cache hits, seconds waited."""
        totals = self.counts + self.processor.decoder.counts
        damaged = {f"quarantine/{reason}": n for reason, n in self.quarantine.counts.items()}
        return {**totals, **damaged, "quarantined": len(self.quarantine), "data_wait_s": self.wait_seconds}

    def reset(self) -> None:
        """Forget what was announced and not taken."""
        self._backlog.clear()
        for future in (*self._pending.values(), *self._plans.values()):
            future.cancel()
        self._pending.clear()
        self._plans.clear()

    def keep_only(self, requests: Iterable[Request]) -> None:
        """Forget what was announced beside these."""
        wanted = {request.key for request in requests}
        for key in [key for key in self._backlog if key not in wanted]:
            del self._backlog[key]
        for key in [key for key in self._pending if key not in wanted]:
            self._pending.pop(key).cancel()

    def close(self) -> None:
        """End the workers."""
        self._backlog.clear()
        if self._pool:
            self._pool.close()

    def _forget(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._backlog.pop(request.key, None)
            future = self._pending.pop(request.key, None)
            if future:
                future.cancel()

    def _pump(self) -> None:
        while self._pool and self._backlog and len(self._pending) < self._ahead:
            key, request = self._backlog.popitem(last=False)
            if not self.quarantine.of(request.sample, request.use) and not self.processor.holds(
                request.sample, request.horizon
            ):
                self._pending[key] = self._pool.submit(Task(_light(request)))

    def _here(self, request: Request) -> Prompt | None:
        began = time.perf_counter()
        cached = self._pool is not None
        try:
            prompt = self.processor.load(self._plan_here(request))
        except DataError as error:
            self._damaged(request, error)
            return None
        if cached:
            self.counts["decode/cached"] += len(prompt.media)
        else:
            self.wait_seconds += time.perf_counter() - began
        return prompt

    def _plan_here(self, request: Request) -> Prompt:
        prompt = self._planned.get(request.key)
        if prompt is None:
            return self._keep(request, plan_request(self.processor, request))
        return replace(prompt, sample=request.sample)

    def _keep(self, request: Request, prompt: Prompt) -> Prompt:
        self._planned.put(request.key, replace(prompt, sample=_light(request).sample))
        return replace(prompt, sample=request.sample)

    def _wait(self, future: Future[Any]) -> Any:
        began = time.perf_counter()
        result = future.result()
        self.wait_seconds += time.perf_counter() - began
        return result

    def _finish(self, request: Request, future: Future[Any]) -> Prompt | None:
        answer, pixels, patches = self._wait(future)
        prompt = self._accept(request, answer)
        if prompt is None:
            return None
        for media, pixels_PV in zip(prompt.media, pixels, strict=True):
            self.processor.cache.put(plan_key(media.plan), pixels_PV)
        decoded = tuple(PromptMedia(item.plan, ready) for item, ready in zip(prompt.media, patches, strict=True))
        return replace(prompt, media=decoded)

    def _accept(self, request: Request, answer: Answer) -> Prompt | None:
        if answer.failure:
            raise RuntimeError(f"sample {request.sample.id}: a data worker failed:\n{answer.failure}")
        self.counts.update(answer.counts or {})
        if answer.error is not None:
            self._damaged(request, answer.error)
            return None
        assert answer.prompt is not None
        # A conversation that was cut has only the first of its media.
        for media, planned in zip(request.sample.media, answer.prompt.media, strict=False):
            self.processor.remember(media, request.horizon, planned.plan)
        return self._keep(request, answer.prompt)

    def _damaged(self, request: Request, error: DataError) -> None:
        self.quarantine.add(request.sample.id, error, request.sample.media, request.use)


def _light(request: Request) -> Request:
    """Without what only scorers need: a mask needn't travel to a decoder and back."""
    return replace(request, sample=replace(request.sample, extras={}, gold=None))


class _WorkerPool:
    """One thread per worker process; a thread takes tasks and waits for its process."""

    def __init__(self, setup: Setup, count: int, processor: Processor) -> None:
        self._geometry = processor.geometry
        self._closed = False
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(setup) for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="data")

    def submit(self, task: Task) -> Future[tuple[Answer, list[Tensor], list[Tensor]]]:
        return self._threads.submit(self._run, task)

    def close(self) -> None:
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def _run(self, task: Task) -> tuple[Answer, list[Tensor], list[Tensor]]:
        """Answer, pixels as bytes, normalised patches. A crash is tried again once in a fresh process."""
        worker = self._idle.get()
        try:
            for _ in range(2):
                try:
                    answer, pixels = worker.ask(task)
                except (EOFError, OSError, ValueError):
                    if self._closed:
                        break
                    worker.restart()
                else:
                    return answer, pixels, [normalise(pixels_PV, self._geometry) for pixels_PV in pixels]
        finally:
            self._idle.put(worker)
        paths = ", ".join(media.path for media in task.request.sample.media)
        return Answer(None, error=MediaError(paths, errors.CRASH, "twice, or no answer in time")), [], []


class _Worker:
    """A decoding process."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = self._start()

    def ask(self, task: Task) -> tuple[Answer, list[Tensor]]:
        """Send a task, wait for its answer; EOFError or OSError where the process died or hung."""
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        watchdog = threading.Timer(TASK_SECONDS, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            write_message(process.stdin, task)
            process.stdin.flush()
            answer: Answer = read_message(process.stdout)
            return answer, [read_pixels(process.stdout, shape) for shape in answer.shapes]
        finally:
            watchdog.cancel()

    def restart(self) -> None:
        """The next task gets a fresh process."""
        self.kill()
        self._close_pipes()
        self._process = None

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout) if self._process else ():
            try:
                pipe.close()  # type: ignore[union-attr]
            except OSError:
                pass  # what was left to write has nobody to read it

    def kill(self) -> None:
        """End the process. One that waits for a file system that went away ends when that comes back."""
        process = self._process
        if process is not None:
            process.kill()
            try:
                process.wait(KILL_WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                pass

    def _start(self) -> subprocess.Popen[bytes]:
        import dppo_mcore

        root = str(Path(dppo_mcore.__file__).parents[1])
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, "-m", "dppo_mcore.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert process.stdin
        write_message(process.stdin, self._setup)
        process.stdin.flush()
        return process
