"""The weight sync itself: every rank writes its pieces of bucket k+1 while the engine loads bucket k."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dppo_mcore.config import Config
from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.weight_map import Piece, WeightMap
from dppo_mcore.model.weights import named_weights
from dppo_mcore.rollout.base import Engine, EngineError, SyncError
from dppo_mcore.rollout.placement import host_name
from dppo_mcore.rollout.replica import Replica
from dppo_mcore.rollout.wire import dtype_name
from dppo_mcore.runtime import device
from dppo_mcore.sync import buffers, verify
from dppo_mcore.sync.plan import Bucket, Item, Owner, RankPlace, SyncPlan, make_plan
from dppo_mcore.sync.transports import TRANSPORTS, Transport
from dppo_mcore.types import Prompt

PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}
"""Of a single token; another model or a blind one is off by more, rounding by less."""


@dataclass(frozen=True)
class SyncReport:
    """Seconds by stage on the leader, and what was moved."""

    version: int
    tensors: int
    nbytes: int
    buckets: int
    seconds: dict[str, float]
    """gather (all ranks writing), wait (for the engine to free a buffer), load (in the engine, overlapped), verify."""
    peak_extra_bytes: int


@dataclass
class WeightSync:
    """Syncs one replica's chunks to its engine. Made, and every method called, by all ranks of the replica."""

    chunks: Sequence[nn.Module]
    engine: Engine
    qwen: QwenConfig
    config: Config
    overlap: bool = True
    verified: bool = True
    bucket_bytes: int | None = None
    host: str = field(default_factory=host_name)
    probe: Callable[[], tuple[Prompt, Sequence[int], Sequence[float]]] | None = None
    """A prompt, an answer and the trainer's present log-probs of it; if set, every push ends with comparing them."""
    _vision_sent: bool = False
    _transport: Transport | None = None

    def __post_init__(self) -> None:
        self._replica: Replica = self.engine.replica  # type: ignore[attr-defined]
        self._map = WeightMap(self.qwen)
        if self.bucket_bytes is None:
            self.bucket_bytes = self.config.rollout.sync_bucket_mib << 20
        if self.config.rollout.weight_transport not in self.engine.receiver.transports:  # type: ignore[union-attr]
            raise SyncError(
                f"weight_transport: engine {self.engine.name} has no {self.config.rollout.weight_transport}"
            )
        self._tensor_rank, self._tensor_parallel, self._stage = _place()
        self._places: list[RankPlace] = self._replica.gather(RankPlace(self._stage, self._tensor_rank, self.host))
        self._make_transport()

    def _make_transport(self) -> None:
        name = self.config.rollout.weight_transport
        self._transport = TRANSPORTS[name](self.engine.receiver, Path(self.config.run.model))  # type: ignore[arg-type]

    def push(self, version: int) -> SyncReport:
        """Make the engine answer with this replica's present weights, verified; collective.

        An engine that was lost since it last answered, or is lost meanwhile, is started anew and gets them then.
        """
        left = self.config.rollout.rollout_retries
        while True:
            try:
                return self._push(version)
            except (EngineError, SyncError) as error:  # on all ranks; any other is this rank's own and ends the job
                if not left or not self.engine.revive(error):  # type: ignore[attr-defined]
                    raise
            left -= 1
            self._renew()

    def _push(self, version: int) -> SyncReport:
        """Into the engine, which is awake as a whole afterwards."""
        reports: list[SyncReport] = []
        if self.engine.weight_version < 0:
            self._vision_sent = False  # it slept, or is new: the tower is gone with the rest
        self.engine.wake(("weights",))
        self.engine.update_weights(version, lambda: reports.append(self._load(version)))
        self.engine.wake()
        if self.probe is not None:
            prompt, answer, trainer = self.probe()
            limit = PROBE_TOLERANCE[self.config.model.dtype]
            held = self.engine.score([prompt], [answer])[0]
            self._on_leader("log-prob check", lambda: verify.compare_logprobs(trainer, held, limit))
        return reports[0]

    def again(self) -> None:
        """The same to a restarted engine, which holds nothing."""
        self._renew()
        self._push(self.engine.weight_version)

    def _renew(self) -> None:
        self._vision_sent = False
        if self._transport is not None:
            self._transport.stop()
        self._make_transport()

    def stop(self) -> None:
        """Let go of what outlives a sync (a group with the engine); the next push makes it anew."""
        if self._transport is not None:
            self._transport.stop()

    def plan(self) -> SyncPlan:
        """This sync's plan; an error if any rank made another one."""
        own = {}
        for name, parameter in named_weights(self.chunks).items():
            own[self._map[name].name] = parameter
        self._own: dict[str, Tensor] = {name: parameter.data for name, parameter in own.items()}
        mine = {
            name: Owner(self._stage, dtype_name(parameter.dtype), parameter.requires_grad)
            for name, parameter in own.items()
        }
        gathered = self._replica.gather(mine)
        owners: dict[str, Owner] = {}
        entries = list(self._map.exported())
        for entry in entries:
            stages = {owned[entry.name].stage for owned in gathered if entry.name in owned}
            if len(stages) != 1:
                raise SyncError(f"weight sync: {entry.name} lives on {len(stages)} pipeline stages, not on one")
            owners[entry.name] = next(owned[entry.name] for owned in gathered if entry.name in owned)
        wants_vision = self.engine.receiver.wants_vision  # type: ignore[union-attr]
        assert self._transport is not None and self.bucket_bytes is not None
        plan = make_plan(
            [e for e in entries if self._due(e.name, owners[e.name])],
            owners,
            self._places,
            self.bucket_bytes,
            self._transport.alignment,
            vision=wants_vision,
        )
        digests = self._replica.gather(plan.digest())
        if len(set(digests)) != 1:
            odd = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
            raise SyncError(f"weight sync: rank {odd} of the replica planned another sync than rank 0")
        return plan

    def _due(self, name: str, owner: Owner) -> bool:
        """A frozen tower travels once."""
        return not (name.startswith("vision.") and self._vision_sent and not owner.learns)

    def _load(self, version: int) -> SyncReport:
        began = time.perf_counter()
        plan = self.plan()
        seconds = {"plan": time.perf_counter() - began, "gather": 0.0, "wait": 0.0, "load": 0.0, "verify": 0.0}
        largest = max((bucket.nbytes for bucket in plan.buckets), default=0)
        pool = buffers.Buffers(device.device().type, min(self.bucket_bytes or 0, largest), 2 if self.overlap else 1)
        try:
            self._on_leader("opening", lambda: self._transport.open(version))  # type: ignore[union-attr]
            self._stream(plan, pool, seconds)
            self._on_leader("closing", lambda: self._transport.close(version))  # type: ignore[union-attr]
        except BaseException:
            if self._transport is not None:
                self._transport.stop()
            self._make_transport()
            raise
        finally:
            pool.close()
        began = time.perf_counter()
        if self.verified:
            self._verify(plan)
        seconds["verify"] = time.perf_counter() - began
        self._vision_sent = True
        return SyncReport(version, len(plan.shapes), plan.nbytes, len(plan.buckets), seconds, pool.peak)

    def _stream(self, plan: SyncPlan, pool: buffers.Buffers, seconds: dict[str, float]) -> None:
        """Gather and hand over bucket after bucket."""
        loading: deque[tuple[Future[float], buffers.Buffer]] = deque()
        mapped: dict[str, Tensor] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="weight-load") as thread:
            try:
                for bucket in plan.buckets:
                    began = time.perf_counter()
                    buffer = self._on_leader("loading", partial(self._take, bucket, pool, loading, seconds))
                    seconds["wait"] += time.perf_counter() - began
                    began = time.perf_counter()
                    try:
                        self._gather(bucket, partial(self._memory, buffer, self._handle(buffer), mapped))
                    except BaseException:
                        if buffer is not None:
                            pool.give(buffer)
                        raise
                    seconds["gather"] += time.perf_counter() - began
                    if buffer is not None:
                        loading.append((thread.submit(self._hand_over, bucket, buffer), buffer))
                began = time.perf_counter()
                self._on_leader("loading", partial(self._finish, loading, pool, seconds))
                seconds["wait"] += time.perf_counter() - began
            finally:
                for future, buffer in loading:
                    future.exception()
                    pool.give(buffer)

    def _handle(self, buffer: buffers.Buffer | None) -> dict[str, Any] | None:
        """The leader's buffer for the ranks of its node; none is made where nobody would open it."""
        shared = sum(place.host == self._places[0].host for place in self._places) > 1
        return self._replica.broadcast(buffer.handle if buffer is not None and shared else None)

    def _memory(
        self, buffer: buffers.Buffer | None, handle: dict[str, Any] | None, mapped: dict[str, Tensor]
    ) -> Tensor | None:
        """The bucket's memory as this rank sees it; a rank of another node has none and forwards."""
        if buffer is not None:
            return buffer.bytes()
        return _mapping(mapped, handle) if handle is not None and self.host == self._places[0].host else None

    def _take(
        self,
        bucket: Bucket,
        pool: buffers.Buffers,
        loading: deque[tuple[Future[float], buffers.Buffer]],
        seconds: dict[str, float],
    ) -> buffers.Buffer:
        while (buffer := pool.take(bucket.nbytes)) is None:
            self._finish_one(loading, pool, seconds)
        if not self.overlap:
            self._finish(loading, pool, seconds)
        return buffer

    def _finish(self, loading: deque[Any], pool: buffers.Buffers, seconds: dict[str, float]) -> None:
        while loading:
            self._finish_one(loading, pool, seconds)

    def _finish_one(self, loading: deque[Any], pool: buffers.Buffers, seconds: dict[str, float]) -> None:
        future, buffer = loading.popleft()
        try:
            seconds["load"] += future.result()
        finally:
            pool.give(buffer)

    def _hand_over(self, bucket: Bucket, buffer: buffers.Buffer) -> float:
        began = time.perf_counter()
        assert self._transport is not None
        self._transport.load(bucket.slots, buffer)
        return time.perf_counter() - began

    def _gather(self, bucket: Bucket, memory: Callable[[], Tensor | None]) -> None:
        """Every rank puts its pieces where they belong, its own and those forwarded to it.

        A shard is only sent once all ranks said they are ready for it: nobody waits for a rank that failed before.
        """
        remote = sorted({item.stage for item in bucket.items if item.route == "forward"})
        flat, parcels = self._everywhere("gathering", partial(self._write, bucket, memory, remote))
        for stage in remote:
            items = [item for item in bucket.items if item.route == "forward" and item.stage == stage]
            if self._stage in (0, stage):
                self._forward(items, flat, parcels.get(stage))
        if remote:
            self._everywhere("forwarding", device.synchronize)

    def _write(
        self, bucket: Bucket, memory: Callable[[], Tensor | None], remote: Sequence[int]
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Place own pieces; returns the memory and, on a stage of another node, its parcel for the first stage."""
        flat = memory()
        parcels: dict[int, Tensor] = {}
        for item in bucket.items:
            if item.route == "write" and item.stage == self._stage:
                assert flat is not None
                for piece in self._pieces(item):
                    _place_piece(item, piece, flat)
        if self._stage in remote:
            mine = [item for item in bucket.items if item.route == "forward" and item.stage == self._stage]
            parts = [piece.view.reshape(-1).view(torch.uint8) for item in mine for piece in self._pieces(item)]
            if parts:
                parcels[self._stage] = torch.cat(parts)
        device.synchronize()
        return flat, parcels

    def _forward(self, items: Sequence[Item], flat: Tensor | None, parcel: Tensor | None) -> None:
        """Send a parcel to the first stage's rank of the same tensor-parallel index, or receive it and unpack."""
        from megatron.core import parallel_state

        group = parallel_state.get_pipeline_model_parallel_group()
        if self._stage:
            if parcel is not None:
                dist.send(parcel, dist.get_global_rank(group, 0), group=group)
            return
        templates = [(item, piece) for item in items for piece in self._pieces(item)]
        sizes = [piece.view.numel() * piece.view.element_size() for _, piece in templates]
        if not templates:
            return
        assert flat is not None
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device.device())
        dist.recv(received, dist.get_global_rank(group, items[0].stage), group=group)
        for (item, piece), part in zip(templates, received.split(sizes), strict=True):
            shard = part.view(piece.view.dtype).view(piece.view.shape)
            _place_piece(item, Piece(piece.tensor, shard, piece.dim, piece.start, piece.length), flat)

    def _pieces(self, item: Item) -> list[Piece]:
        """This tensor-parallel rank's pieces; of a shard held elsewhere, their shapes only."""
        entry = self._map.entries[item.name]
        if entry.kind == "replicated" and self._tensor_rank:
            return []
        shard = self._own.get(item.name)
        if shard is None or item.stage != self._stage:
            dtype = getattr(torch, item.slots[0].dtype)
            shard = torch.empty(self._shard_shape(item.name), dtype=dtype, device="meta")
        return entry.pieces(shard, self._tensor_parallel, self._tensor_rank)

    def _shard_shape(self, name: str) -> tuple[int, ...]:
        from dppo_mcore.model.config import padded_vocab_size

        return self._map.entries[name].shape(self._tensor_parallel, padded_vocab_size(self.qwen, self._tensor_parallel))

    def _verify(self, plan: SyncPlan) -> None:
        """Fingerprints of the ranks' own shards against what the engine holds."""
        own: dict[str, int] = {name: 0 for name in plan.shapes}
        for bucket in plan.buckets:
            for item in bucket.items:
                if item.stage == self._stage and item.name in self._own:
                    for piece in self._pieces(item):
                        own[piece.tensor.name] = verify.piece_fingerprint(piece)
        expected = verify.total(self._replica.gather(own))
        receiver = self.engine.receiver

        def check() -> None:
            assert receiver is not None
            held = receiver.fingerprints(plan.shapes)
            if held is not None:
                verify.compare(expected, held, self.engine.name)

        self._on_leader("verification", check)

    def _on_leader(self, stage: str, action: Callable[[], Any]) -> Any:
        """Run `action` on the leader; its result there, None elsewhere, its failure everywhere."""
        return self._everywhere(stage, action if self._replica.is_leader else lambda: None)

    def _everywhere(self, stage: str, action: Callable[[], Any]) -> Any:
        """Run `action` on all ranks; one rank's failure is everybody's `SyncError`, so that nobody waits for it."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        reason = None if failure is None else str(failure) or repr(failure)
        failures = self._replica.gather(reason)
        if isinstance(failure, SyncError):
            raise failure
        if failure is not None:
            raise SyncError(f"weight sync, {stage}: {reason}") from failure
        first = next((rank for rank, text in enumerate(failures) if text is not None), None)
        if first is not None:
            raise SyncError(f"weight sync, {stage}: rank {first} of the replica failed: {failures[first]}")
        return result


def _place_piece(item: Item, piece: Piece, flat: Tensor) -> None:
    slot = next(slot for slot in item.slots if slot.name == piece.tensor.name)
    piece.of(slot.view(flat)).copy_(piece.view)


def _mapping(mapped: dict[str, Tensor], handle: dict[str, Any]) -> Tensor:
    """The leader's buffer as this rank maps it; one that comes again is mapped once, one for a large tensor dropped."""
    key = str(handle)
    if key not in mapped:
        if len(mapped) == 2:
            mapped.clear()
        mapped[key] = buffers.attach(handle)
    return mapped[key]


def _place() -> tuple[int, int, int]:
    """(tensor rank, tensor parallel size, pipeline stage) of this rank."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )


def attach(chunks: Sequence[nn.Module], engine: Engine, qwen: QwenConfig, config: Config) -> WeightSync | None:
    """The sync of an engine with weights of its own, also used when it restarts; None for one that reads ours."""
    if engine.receiver is None:
        return None
    sync = WeightSync(chunks, engine, qwen, config)
    engine.push_again = sync.again  # type: ignore[attr-defined]
    engine.weight_sync = sync  # type: ignore[attr-defined]
    return sync


def push(chunks: Sequence[nn.Module], engine: Engine, version: int) -> SyncReport | None:
    """Make `engine` answer with the chunks' present weights as `version`; collective over the replica."""
    if engine.receiver is None:
        engine.update_weights(version)
        return None
    sync: WeightSync | None = getattr(engine, "weight_sync", None)
    if sync is None or list(sync.chunks) != list(chunks):
        if sync is not None:
            sync.stop()
        sync = attach(chunks, engine, engine.qwen, engine.config)  # type: ignore[attr-defined]
    assert sync is not None
    return sync.push(version)
