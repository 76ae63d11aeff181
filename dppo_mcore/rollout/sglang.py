"""The SGLang engine: a sidecar of its own, or a server given by URL."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor

from dppo_mcore.rollout import wire
from dppo_mcore.rollout.answers import RawAnswer
from dppo_mcore.rollout.base import EngineError, GenerationRequest, Sampling, TensorMeta
from dppo_mcore.rollout.client import EngineClient
from dppo_mcore.rollout.http import HttpClient, HttpReceiver
from dppo_mcore.rollout.media import positions, probe_clip, share_embeddings, share_patches
from dppo_mcore.rollout.placement import visible
from dppo_mcore.rollout.server import ServerEngine
from dppo_mcore.rollout.sglang_options import engine_options, environment, sampling_params
from dppo_mcore.rollout.sidecar_client import CONTROL_S, EngineDied, SidecarClient
from dppo_mcore.runtime import device
from dppo_mcore.types import Prompt, Rollout

GREEDY = 0.0
VISION_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


class SglangEngine(ServerEngine):
    """SGLang behind the engine protocol."""

    name = "sglang"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sends_embeddings = self.config.rollout.engine_vision == "embeddings"
        self._vision_checked = False
        rollout = self.config.rollout
        shares_gpus = rollout.rollout_placement == "colocated" and not rollout.rollout_url
        if shares_gpus and rollout.weight_transport == "distributed" and device.backend() == "nccl":
            raise EngineError(
                "weight_transport: distributed needs the engine on GPUs of its own, since NCCL takes one rank a GPU; "
                "use ipc, or rollout_placement disjoint"
            )
        self.receiver = SidecarReceiver(self)
        if rollout.rollout_url:
            self.receiver = HttpReceiver(self._http)

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[Rollout]:
        """As any server engine; an engine with its own tower is checked before the first media go out."""
        if not self.sends_embeddings and not self._vision_checked and any(r.prompt.media for r in requests):
            self.check_vision()
        yield from super().generate(requests, sampling)

    def check_vision(self) -> None:
        """Score a probe clip twice, with the trainer's embeddings and with patches; refuse an engine that differs.

        Both go through the engine's own language model, so a difference is its tower's or its positions'.
        """
        probe, answer = probe_clip(self.qwen)
        embeddings_MH = self.encoder.embeddings(probe)

        def difference() -> float:
            client = self.client
            assert isinstance(client, SidecarEngineClient) and embeddings_MH is not None
            unit = self.qwen.vision.merge_unit
            rows = []
            for shared in (
                SharedMedia(*share_embeddings(probe, embeddings_MH, positions(probe, self.qwen), unit)),
                SharedMedia(*share_patches(probe)),
            ):
                rows.append(client.score(probe, answer, shared))
                shared.close()
            return max(abs(left - right) for left, right in zip(*rows, strict=True))

        worst = self._on_leader(difference)
        limit = VISION_TOLERANCE[self.config.model.dtype]
        if not worst <= limit:
            raise EngineError(
                f"engine_vision: own is refused: on a probe clip the engine's own tower moves log-probs by "
                f"{worst:.4f} (limit {limit:g}); SGLang lets a clip's frames attend to each other, Qwen2.5-VL doesn't. "
                "Use --engine-vision embeddings"
            )
        self._vision_checked = True

    def _http(self) -> HttpClient:
        assert isinstance(self.client, HttpClient)
        return self.client

    def open_client(self) -> EngineClient:
        """Reach the server given by URL, or start a sidecar."""
        if url := self.config.rollout.rollout_url:
            return HttpClient(url, self.config.rollout.rollout_timeout_s, self.config.rollout.rollout_max_in_flight)
        rollout, kind = self.config.rollout, device.device().type
        options = engine_options(self.config, kind, self.config.run.seed)
        devices = self.replica.devices(rollout.rollout_placement, options["tp_size"])
        named, count = os.environ.get("CUDA_VISIBLE_DEVICES", ""), device.count()
        variables = environment(kind, options["tp_size"], visible(devices, named, count) if count else "")
        log = Path(self.config.run.run) / "logs" / f"engine-{self.replica.index}.log"
        return SidecarEngineClient(SidecarClient(rollout.rollout_python, options, log.absolute(), variables), self)


class SharedMedia:
    """A prompt's media in shared memory and the handle that names them."""

    def __init__(self, buffer: wire.SharedBuffer, handle: dict[str, Any]) -> None:
        self.buffer, self.handle = buffer, handle

    def close(self) -> None:
        """Free them once no process maps them."""
        self.buffer.close()


class SidecarEngineClient:
    """`EngineClient` over a sidecar."""

    def __init__(self, sidecar: SidecarClient, engine: ServerEngine) -> None:
        self.sidecar = sidecar
        self._qwen = engine.qwen
        self._embeddings = engine.sends_embeddings
        self._scores = itertools.count()

    def submit(
        self, rid: str, request: GenerationRequest, index: int, sampling: Sampling, media: Any
    ) -> Future[RawAnswer]:
        """One answer; a prefix goes in as further prompt tokens."""
        prefix = request.prefixes.get(index)
        ids = list(request.prompt.token_ids) + list(prefix.token_ids if prefix else ())
        inner = self.sidecar.submit(
            "generate",
            rid=rid,
            input_ids=ids,
            sampling=sampling_params(sampling, request.token_seed(index), request.room(index, sampling)),
            media=None if media is None else media.handle,
            score_from=None,
        )
        outer: Future[RawAnswer] = Future()
        inner.add_done_callback(lambda future: _translate(future, outer))
        return outer

    def score(self, prompt: Prompt, answer: Sequence[int], media: Any) -> list[float]:
        """Log-probs [len(answer)]: the answer goes in as prompt and one token comes out."""
        count = len(prompt.token_ids)
        reply = self.sidecar.call(
            "generate",
            rid=f"score#{next(self._scores)}",
            input_ids=[*prompt.token_ids, *answer],
            sampling={"max_new_tokens": 1, "temperature": GREEDY, "ignore_eos": True},
            media=None if media is None else media.handle,
            score_from=count - 1,
        )
        return [float(value) for value in reply["input_logprobs"][1:]]

    def share(self, prompt: Prompt, embeddings_MH: Tensor | None, positions_3L: Tensor) -> SharedMedia:
        """Embeddings and positions, or patches for an engine that encodes itself."""
        if not self._embeddings:
            return SharedMedia(*share_patches(prompt))
        if embeddings_MH is None:
            raise EngineError("the replica's leader holds no vision tower; it must be on pipeline stage 0")
        return SharedMedia(*share_embeddings(prompt, embeddings_MH, positions_3L, self._qwen.vision.merge_unit))

    def abort(self, rid: str | None = None) -> None:
        """End one request, or all."""
        self.sidecar.submit("abort", rid=rid)

    def pause(self) -> None:
        """Hold running requests; they give their cache back and are computed again under the weights of then."""
        self.sidecar.call("pause", timeout_s=CONTROL_S, mode="retract")

    def resume(self) -> None:
        """Let them go on."""
        self.sidecar.call("resume", timeout_s=CONTROL_S)

    def sleep(self, tags: Sequence[str]) -> None:
        """Release memory, once idle."""
        self.sidecar.call("sleep", tags=list(tags))

    def wake(self, tags: Sequence[str]) -> None:
        """Take it again."""
        self.sidecar.call("wake", tags=list(tags))

    def alive(self) -> bool:
        """Whether the sidecar and all its workers run."""
        try:
            children = self.sidecar.call("ping", timeout_s=10.0)["children"]
        except EngineDied:
            return False
        return all(runs(child) for child in children)

    def close(self) -> None:
        """End the sidecar."""
        self.sidecar.close()


def runs(pid: int) -> bool:
    """Whether a process of this machine exists and hasn't ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _translate(future: Future[Any], outer: Future[RawAnswer]) -> None:
    error = future.exception()
    if error is not None:
        outer.set_exception(error)
        return
    try:
        outer.set_result(raw_answer(future.result()))
    except Exception as mistake:
        outer.set_exception(mistake)


def raw_answer(reply: Mapping[str, Any]) -> RawAnswer:
    """A sidecar's reply as a `RawAnswer`."""
    finish = reply["finish"]
    return RawAnswer(
        token_ids=tuple(reply["ids"]),
        logprobs=tuple(float(value) for value in reply["logprobs"]),
        finish=finish["type"],
        versions=tuple((int(version), start, end) for version, start, end in reply["versions"]),
        matched=finish["matched"] if isinstance(finish.get("matched"), str) else "",
    )


class SidecarReceiver:
    """The weight side of a sidecar, on the leader."""

    transports = frozenset({"ipc", "distributed", "disk"})

    def __init__(self, engine: SglangEngine) -> None:
        self._engine = engine
        self._version = -1

    @property
    def wants_vision(self) -> bool:
        """Only an engine with its own tower in use."""
        return not self._engine.sends_embeddings

    @property
    def _sidecar(self) -> SidecarClient:
        client = self._engine.client
        assert isinstance(client, SidecarEngineClient)
        return client.sidecar

    def begin(self, version: int) -> None:
        """Hold requests, open the session."""
        self._version = version
        self._sidecar.call("pause", timeout_s=CONTROL_S, mode="retract")
        self._sidecar.call("begin")

    def load_shared(self, metas: Sequence[TensorMeta], handle: Mapping[str, Any]) -> None:
        """One bucket out of shared memory."""
        self._sidecar.call("load_shared", handle=dict(handle), version=self._version)

    def join_group(self, address: str, port: int, backend: str) -> Any:
        """Form the group of leader and engine ranks."""
        from dppo_mcore.rollout.weight_group import join

        future = self._sidecar.submit("join_group", address=address, port=port, backend=backend)
        group = join(address, port, backend, 0, 1 + self._engine.config.rollout.rollout_tensor_parallel_size)
        future.result(120)
        return group

    def leave_group(self) -> None:
        """Dissolve it."""
        self._sidecar.call("leave_group", timeout_s=CONTROL_S)

    def load_broadcast(self, metas: Sequence[TensorMeta], send: Callable[[], None]) -> None:
        """One bucket by broadcast."""
        slots = [[meta.name, meta.dtype, list(meta.shape), 0] for meta in metas]
        future = self._sidecar.submit("load_broadcast", slots=slots, version=self._version)
        send()
        future.result(600)

    def load_disk(self, path: str, version: int) -> None:
        """A Hugging Face directory."""
        self._sidecar.call("load_disk", path=path, version=version)

    def end(self, version: int) -> None:
        """Close the session, let requests go on."""
        self._sidecar.call("end", version=version)
        self._sidecar.call("resume", timeout_s=CONTROL_S)

    def fingerprints(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """What the engine holds, per Hugging Face tensor (`rollout.fingerprint`)."""
        return self._sidecar.call("fingerprints", shapes={name: list(shape) for name, shape in shapes.items()})
