"""vLLM's server behind the engine protocol: text over its completions API, weights by CUDA IPC or disk.

Written against vLLM's documented API and tested against this project's protocol suite with a stand-in server; not
verified on a real vLLM, whose only CPU build doesn't take live weights.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dppo_mcore.rollout import wire
from dppo_mcore.rollout.answers import RawAnswer
from dppo_mcore.rollout.base import EngineError, GenerationRequest, Sampling, TensorMeta
from dppo_mcore.rollout.client import EngineClient
from dppo_mcore.rollout.http import HttpClient
from dppo_mcore.rollout.server import ServerEngine
from dppo_mcore.types import Prompt

FINISH = {"stop": "stop", "length": "length", "abort": "abort"}


class VllmEngine(ServerEngine):
    """A vLLM server given by URL.

    It must run with `VLLM_SERVER_DEV_MODE=1`, `--logprobs-mode processed_logprobs` (log-probs of the distribution
    sampled from), `--return-tokens-as-token-ids` and, for `ipc`, `--weight-transfer-config '{"backend": "ipc"}'`.
    """

    name = "vllm"
    sends_embeddings = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if not self.config.rollout.rollout_url:
            raise EngineError("rollout_url: a vLLM engine is started outside the trainer; give its URL")
        self.receiver = VllmReceiver(self._http)

    def _http(self) -> VllmClient:
        assert isinstance(self.client, VllmClient)
        return self.client

    def open_client(self) -> EngineClient:
        """Reach the server."""
        rollout = self.config.rollout
        return VllmClient(rollout.rollout_url, rollout.rollout_timeout_s, rollout.rollout_max_in_flight, self)


class VllmClient(HttpClient):
    """vLLM's routes."""

    def __init__(self, url: str, timeout_s: float, max_in_flight: int, engine: ServerEngine) -> None:
        self._engine = engine
        self.model = ""
        super().__init__(url, timeout_s, max_in_flight)

    def check_server(self) -> None:
        """The name the server gave its model."""
        self.model = self.get("/v1/models")["data"][0]["id"]

    def generate(self, rid: str, request: GenerationRequest, index: int, sampling: Sampling) -> RawAnswer:
        """One answer over `/v1/completions`; all of it has one version, since updates wait for running requests."""
        prefix = request.prefixes.get(index)
        prefix_ids = prefix.token_ids if prefix else ()
        version = self._engine.weight_version
        reply = self.post(
            "/v1/completions",
            self.timeout_s,
            model=self.model,
            request_id=rid,
            prompt=[*request.prompt.token_ids, *prefix_ids],
            max_tokens=request.room(index, sampling),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=request.token_seed(index),
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            include_stop_str_in_output=True,
            logit_bias={str(token): -100 for token in sampling.banned_token_ids},
            logprobs=0,
            return_token_ids=True,
        )
        choice = reply["choices"][0]
        ids = tuple(choice["token_ids"])
        if choice["finish_reason"] not in FINISH:
            raise RuntimeError(f"vLLM ended an answer with {choice['finish_reason']!r}")
        return RawAnswer(
            token_ids=ids,
            logprobs=tuple(float(value) for value in choice["logprobs"]["token_logprobs"]),
            finish=choice["finish_reason"],
            versions=((version, 0, len(ids)),) if ids else (),
        )

    def score(self, prompt: Prompt, answer: Sequence[int], media: Any) -> list[float]:
        """Log-probs [len(answer)] from the prompt's side."""
        ids = [*prompt.token_ids, *answer]
        reply = self.post(
            "/v1/completions", model=self.model, prompt=ids, max_tokens=1, temperature=0.0, prompt_logprobs=0
        )
        rows = reply["choices"][0]["prompt_logprobs"][len(prompt.token_ids) :]
        return [float(row[str(token)]["logprob"]) for row, token in zip(rows, answer, strict=True)]

    def abort(self, rid: str | None = None) -> None:
        """vLLM ends requests by pausing in abort mode; a single one is left to finish and ignored."""
        if rid is None:
            self.post("/pause?mode=abort")
            self.post("/resume")

    def pause(self) -> None:
        """Hold running requests with their cache."""
        self.post("/pause?mode=keep")

    def resume(self) -> None:
        """Let them go on."""
        self.post("/resume")

    def flush(self) -> None:
        """Empty the prefix cache."""
        self.post("/reset_prefix_cache")

    def sleep(self, tags: Sequence[str]) -> None:
        """Weights to the host and the cache away, or the cache only kept out of use."""
        self.post("/sleep?level=1")

    def wake(self, tags: Sequence[str]) -> None:
        """Take memory again, part by part."""
        self.post("/wake_up?" + "&".join(f"tags={tag}" for tag in tags))


class VllmReceiver:
    """vLLM's four-phase weight update."""

    transports = frozenset({"ipc", "disk"})
    wants_vision = False

    def __init__(self, client: Callable[[], VllmClient]) -> None:
        self._client = client
        self._began = False
        self._ready: VllmClient | None = None
        """The client whose server has made its side of the transfer."""

    def begin(self, version: int) -> None:
        """Let running requests end, since vLLM doesn't say which tokens came from which weights."""
        self._client().post("/pause?mode=wait")
        self._began = False

    def load_shared(self, metas: Sequence[TensorMeta], handle: Mapping[str, Any]) -> None:
        """One bucket as CUDA IPC handles, one per tensor."""
        from dppo_mcore.rollout.engine_loader import cuda_buffer

        if "cuda" not in handle:
            raise EngineError("weight_transport: vLLM takes ipc from a GPU only; use disk")
        client = self._client()
        if self._ready is not client:
            client.post("/init_weight_transfer_engine", init_info={})
            self._ready = client
        if not self._began:
            client.post("/start_weight_update", is_checkpoint_format=True)
            self._began = True
        flat = cuda_buffer(handle)
        slots = [wire.Slot.from_json(value) for value in handle["slots"]]
        tensors = [slot.view(flat) for slot in slots]
        handles = [{handle["cuda"]["uuid"]: torch.multiprocessing.reductions.reduce_tensor(t)} for t in tensors]
        client.post(
            "/update_weights",
            update_info={
                "names": [slot.name for slot in slots],
                "dtype_names": [slot.dtype for slot in slots],
                "shapes": [list(slot.shape) for slot in slots],
                "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
            },
        )

    def join_group(self, address: str, port: int, backend: str) -> Any:
        """vLLM's group isn't one of torch's."""
        raise EngineError("weight_transport: vLLM's own NCCL group is not supported; use ipc or disk")

    def leave_group(self) -> None:
        """There is none."""

    def load_broadcast(self, metas: Sequence[TensorMeta], send: Callable[[], None]) -> None:
        """See `join_group`."""
        self.join_group("", 0, "")

    def load_disk(self, path: str, version: int) -> None:
        """A Hugging Face directory both processes see."""
        self._client().post("/collective_rpc", method="reload_weights", kwargs={"weights_path": path})

    def end(self, version: int) -> None:
        """Finish, drop what older weights cached, let requests go on."""
        client = self._client()
        if self._began:
            client.post("/finish_weight_update")
            self._began = False
        client.flush()
        client.resume()

    def fingerprints(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
        """None: the log-prob check after the sync stands in."""
        return None
