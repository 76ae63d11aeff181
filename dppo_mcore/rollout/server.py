"""What every engine in a process of its own has in common: one leader that talks to it, ranks that follow, recovery.

Inside `generate` the leader drives. It sends the other ranks one instruction at a time (encode this prompt's media,
push the weights again, here are finished answers, an error, the end), so all ranks meet in the same collectives and
yield the same answers in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dppo_mcore.config import Config
from dppo_mcore.rollout.answers import RawAnswer, assemble, check_prompt
from dppo_mcore.rollout.base import (
    SLEEP_TAGS,
    EngineError,
    EngineStats,
    GenerationRequest,
    Sampling,
    SleepTag,
    SyncError,
    TextDecoder,
    WeightReceiver,
    banned_ids,
)
from dppo_mcore.rollout.client import EngineClient
from dppo_mcore.rollout.jobs import Job, Queue
from dppo_mcore.rollout.media import Encoder, positions
from dppo_mcore.rollout.replica import Replica
from dppo_mcore.rollout.sidecar_client import EngineDied, Refused
from dppo_mcore.runtime.log import get_logger
from dppo_mcore.types import Prompt, Rollout

if TYPE_CHECKING:
    from dppo_mcore.model.config import QwenConfig

HEARTBEAT_S = 5.0
CACHE_BYTES = 4 << 30
log = get_logger("rollout")


class ServerEngine:
    """An engine behind a client; subclasses say how to open one."""

    name = "server"
    sends_embeddings = True

    def __init__(self, config: Config, qwen: QwenConfig, chunks: Sequence[Any], tokenizer: TextDecoder) -> None:
        self.config, self.qwen, self.tokenizer = config, qwen, tokenizer
        self.replica = Replica()
        self.encoder = Encoder(chunks, qwen, CACHE_BYTES)
        self.weight_version = -1
        self.receiver: WeightReceiver | None = None
        self.push_again: Callable[[], None] | None = None
        """Hands the current weights over once more, on all ranks together; `sync.attach` sets it."""
        self.restarts = 0
        self._client: EngineClient | None = None
        self._aborting = False
        self._queue: Queue | None = None
        self._tokens = 0
        self._began = time.monotonic()
        self._rids = 0
        self._damaged = False
        self._push_failed = ""
        self._asleep: set[str] = set()

    def open_client(self) -> EngineClient:
        """Start or reach the server; on the leader."""
        raise NotImplementedError

    @property
    def client(self) -> EngineClient:
        """The leader's client."""
        if self._client is None:
            raise EngineError(f"engine {self.name} is not started")
        return self._client

    def start(self) -> None:
        """Bring the server up and check it, on the leader; all ranks learn whether that worked."""
        self._on_leader(self._open)

    def _open(self) -> None:
        self._client = self.open_client()

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[Rollout]:
        """Yield every answer once; see `base.Engine.generate`."""
        self._require_awake()
        if self._damaged:
            raise EngineError(f"engine {self.name}: its last weight sync failed, so its weights are undefined")
        limit, media_ids = self.config.rollout.max_prompt_tokens, banned_ids(self.qwen)
        for request in requests:
            check_prompt(request, limit, media_ids)
        self._aborting, self._tokens, self._began = False, 0, time.monotonic()
        if not self.replica.is_leader:
            yield from self._follow(requests)
            return
        try:
            for kind, value in self._lead(requests, sampling):
                self.replica.broadcast((kind, value))
                yield from self._obey(kind, value, requests)
        except GeneratorExit:
            raise
        except BaseException as error:
            self.replica.broadcast(("error", f"{type(error).__name__}: {error}" if not str(error) else str(error)))
            raise
        self.replica.broadcast(("end", None))

    def _follow(self, requests: Sequence[GenerationRequest]) -> Iterator[Rollout]:
        while True:
            kind, value = self.replica.broadcast()
            if kind == "end":
                return
            if kind == "error":
                raise EngineError(value)
            yield from self._obey(kind, value, requests)

    def _obey(self, kind: str, value: Any, requests: Sequence[GenerationRequest]) -> Iterator[Rollout]:
        """What all ranks do on one instruction; the leader too."""
        if kind == "answers":
            yield from value
        elif kind == "encode":
            prompt = requests[value].prompt
            embeddings_MH = self.encoder.embeddings(prompt) if self.sends_embeddings else None
            if self.replica.is_leader:
                self._shared[value] = self.client.share(prompt, embeddings_MH, positions(prompt, self.qwen))
        elif kind == "push":
            self._push_after_restart()

    def _push_after_restart(self) -> None:
        """Hand the weights over again; an engine that ends meanwhile is only lost once more."""
        self._push_failed = ""
        if self.push_again is None or self.weight_version < 0:
            return
        try:
            self.push_again()
        except (EngineError, SyncError) as error:  # raised on all ranks, so all come here together
            if not self._on_leader(partial(self._was_lost, error)):
                raise
            self._push_failed = str(error) or repr(error)

    def _was_lost(self, error: BaseException) -> bool:
        """Whether an error on the leader was the server's end."""
        return isinstance(error, EngineDied) or isinstance(error.__cause__, EngineDied) or not self.client_alive()

    def revive(self, error: BaseException) -> bool:
        """After `error` outside of `generate`: start a lost server anew, without weights; False if it is well."""
        if not self._on_leader(partial(self._was_lost, error)):
            return False
        failed = self._on_leader(partial(self._restart, str(error)))
        self._asleep.clear()
        if failed:
            raise EngineError(f"engine {self.name} could not be started again: {failed}") from error
        return True

    def client_alive(self) -> bool:
        """Whether the leader's server answers."""
        return self._client is not None and self._client.alive()

    def _lead(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[tuple[str, Any]]:
        """The leader's loop: yields instructions for all ranks."""
        rollout = self.config.rollout
        queue = self._queue = Queue(requests, rollout.rollout_max_in_flight, rollout.rollout_retries)
        self._shared: dict[int, Any] = {}
        futures: dict[Future[RawAnswer], str] = {}
        restarts_left, last_news, last_word = rollout.rollout_retries, time.monotonic(), time.monotonic()
        try:
            while not queue.done:
                if self._aborting:
                    self.client.abort()
                    yield "answers", [self._unsent(job, sampling) for job in queue.abort_waiting()]
                while (job := queue.next()) is not None:
                    if job.request.prompt.media and job.position not in self._shared:
                        yield "encode", job.position
                    future = self._send(queue, job, sampling)
                    futures[future] = job.rid
                done, _ = wait(
                    futures, timeout=min(HEARTBEAT_S, rollout.rollout_timeout_s), return_when=FIRST_COMPLETED
                )
                now = time.monotonic()
                answers, lost = self._collect(done, futures, queue, sampling)
                if answers:
                    last_news = last_word = now
                    yield "answers", answers
                elif now - last_word > HEARTBEAT_S:
                    last_word = now
                    self._say_progress()
                    lost = lost or ("" if self.client_alive() else "it no longer answers")
                    yield "answers", []
                overdue = queue.overdue(now, rollout.rollout_timeout_s)
                if overdue and not lost and now - last_news > rollout.rollout_timeout_s:
                    lost = f"no answer for {rollout.rollout_timeout_s:.0f} s"
                if lost:
                    queue.resend(list(queue.running), "lost its engine", counted=False)
                    futures.clear()
                    self._forget_shared()
                while lost:
                    if restarts_left == 0:
                        raise EngineError(
                            f"engine {self.name} failed {rollout.rollout_retries + 1} times in one batch: {lost}; "
                            "see the engine's log, or raise rollout_retries"
                        )
                    restarts_left -= 1
                    lost = self._restart(lost)
                    if not lost:
                        yield "push", None
                        lost = self._push_failed
                    overdue, last_news = [], time.monotonic()
                if overdue:
                    for rid in overdue:
                        self.client.abort(rid)
                    queue.resend(overdue, f"had no answer within {rollout.rollout_timeout_s:.0f} s")
        finally:
            if queue.running:
                self._drain(futures)
            self._forget_shared()
            self._queue = None

    def _send(self, queue: Queue, job: Job, sampling: Sampling) -> Future[RawAnswer]:
        self._rids += 1
        rid = f"{job.request.sample_id}#{job.index}#{self._rids}"
        queue.sent(job, rid, time.monotonic())
        return self.client.submit(rid, job.request, job.index, sampling, self._shared.get(job.position))

    def _collect(
        self, done: set[Future[RawAnswer]], futures: dict[Future[RawAnswer], str], queue: Queue, sampling: Sampling
    ) -> tuple[list[Rollout], str]:
        """Finished answers, and why the engine was lost if it was."""
        answers, lost = [], ""
        for future in done:
            rid = futures.pop(future)
            error = future.exception()
            if isinstance(error, EngineDied):
                lost = str(error)
            elif rid not in queue.running:
                continue
            elif isinstance(error, Refused):
                raise EngineError(f"sample {queue.running[rid].request.sample_id}: the engine refused it: {error}")
            elif error is not None:
                queue.resend([rid], f"failed: {error}")
            else:
                raw = future.result()
                if raw.finish == "abort" and not self._aborting:
                    queue.resend([rid], "was aborted by the engine")
                    continue
                job = queue.finish(rid)
                assert job is not None
                rollout = assemble(job.request, job.index, raw, sampling, self.tokenizer)
                self._tokens += len(raw.token_ids)
                answers.append(rollout)
                if queue.prompt_done(job) and (shared := self._shared.pop(job.position, None)) is not None:
                    shared.close()
        return answers, lost

    def _unsent(self, job: Job, sampling: Sampling) -> Rollout:
        """What an aborted job has that was never sent: its prefix."""
        return assemble(job.request, job.index, RawAnswer((), (), "abort", ()), sampling, self.tokenizer)

    def _drain(self, futures: dict[Future[RawAnswer], str]) -> None:
        """Leave no request behind when the caller stops early."""
        try:
            self.client.abort()
            wait(futures, timeout=30)
        except (EngineDied, OSError):
            pass

    def _forget_shared(self) -> None:
        for shared in self._shared.values():
            shared.close()
        self._shared.clear()

    def _restart(self, reason: str) -> str:
        """End what is left of the server and bring it up anew; why that failed, or nothing."""
        self.restarts += 1
        log.warning("engine %s is restarted (%d): %s", self.name, self.restarts, reason)
        self.client.close()
        self._damaged = False
        self._asleep.clear()
        try:
            self._open()
        except (EngineError, EngineDied) as error:
            return str(error)
        return ""

    def _say_progress(self) -> None:
        stats = self.stats()
        log.info(
            "rollouts: %d of %d done, %d running, %d waiting, %.0f tokens/s",
            stats.finished,
            stats.finished + stats.running + stats.waiting,
            stats.running,
            stats.waiting,
            stats.tokens_per_s,
        )

    def score(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of given answers; collective over the replica."""
        self._require_awake()
        results = []
        for prompt, answer in zip(prompts, answers, strict=True):
            embeddings_MH = self.encoder.embeddings(prompt) if prompt.media and self.sends_embeddings else None
            results.append(self._on_leader(partial(self._score_one, prompt, answer, embeddings_MH)))
        return results

    def _require_awake(self) -> None:
        """What sleeps has no contents, and a server asked to use it ends or answers nonsense."""
        if self._asleep:
            raise EngineError(f"engine {self.name}: asked to answer while asleep ({', '.join(sorted(self._asleep))})")

    def _score_one(self, prompt: Prompt, answer: Sequence[int], embeddings_MH: Tensor | None) -> list[float]:
        shared = self.client.share(prompt, embeddings_MH, positions(prompt, self.qwen)) if prompt.media else None
        try:
            return self.client.score(prompt, answer, shared)
        finally:
            if shared is not None:
                shared.close()

    def _on_leader(self, action: Callable[[], Any]) -> Any:
        """The leader's result on every rank, or its error on every rank."""
        result: Any = None
        failure: BaseException | None = None
        if self.replica.is_leader:
            try:
                result = action()
            except Exception as error:
                failure = error
        result, message = self.replica.broadcast((result, None if failure is None else str(failure)))
        if failure is not None:
            raise failure if isinstance(failure, EngineError) else EngineError(message) from failure
        if message is not None:
            raise EngineError(message)
        return result

    def pause(self) -> None:
        """Hold running requests."""
        self._on_leader(lambda: self.client.pause())

    def resume(self) -> None:
        """Let held requests go on."""
        self._on_leader(lambda: self.client.resume())

    def abort(self) -> None:
        """End what is unfinished; the running `generate` yields it as aborted."""
        self._aborting = True

    def sleep(self, tags: Sequence[SleepTag] = SLEEP_TAGS) -> None:
        """Give memory back; parts that sleep already are left alone, as the server would end on them.

        A server that is gone has none: the next weight sync starts it anew.
        """
        due = [tag for tag in tags if tag not in self._asleep]
        if not due:
            return
        try:
            self._on_leader(lambda: self.client.sleep(due))
        except EngineError as error:
            if not self._on_leader(partial(self._was_lost, error)):
                raise
            log.warning("engine %s was lost before it could sleep: %s", self.name, error)
            self.weight_version = -1
            return
        self._asleep.update(due)
        if "weights" in due:
            self.weight_version = -1

    def wake(self, tags: Sequence[SleepTag] = SLEEP_TAGS) -> None:
        """Take it again; the weights are then undefined, which their version says."""
        due = [tag for tag in tags if tag in self._asleep]
        if due:
            self._on_leader(lambda: self.client.wake(due))
            self._asleep.difference_update(due)

    def update_weights(self, version: int, load: Callable[[], None] | None = None) -> None:
        """Open an update on the engine, run `load` on all ranks, close it; requests held meanwhile go on after."""
        receiver = self.receiver
        assert receiver is not None
        self._on_leader(lambda: receiver.begin(version))
        try:
            if load is not None:
                load()
        except BaseException:
            self._damaged = True
            if self.replica.is_leader:
                with suppress(Exception):
                    receiver.end(-1)
            raise
        self._on_leader(lambda: receiver.end(version))
        self._damaged = False
        if not self.config.model.freeze_vision or not self.config.model.freeze_merger:
            self.encoder.clear()
        self.weight_version = version

    def stats(self) -> EngineStats:
        """Figures of the running `generate`, on the leader."""
        queue, spent = self._queue, max(time.monotonic() - self._began, 1e-9)
        if queue is None:
            return EngineStats(0, 0, 0, self._tokens / spent)
        return EngineStats(len(queue.running), len(queue.waiting), queue.finished, self._tokens / spent)

    def health(self) -> bool:
        """Whether the server answers."""
        return bool(self._on_leader(self.client_alive))

    def stop(self) -> None:
        """End the server; harmless twice."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self.encoder.clear()
        self.replica.close()
