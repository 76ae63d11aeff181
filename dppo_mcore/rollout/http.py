"""A SGLang server given by URL: text prompts over plain HTTP, weights by tensor, group or disk.

The server isn't ours: it is neither started nor ended here, and a lost one is waited for. What would kill it is refused
before it is sent. Media aren't sent: a server's own vision tower computes clips differently (see `sglang.py`).
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import pickle
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from dppo_mcore.rollout import weight_group, wire
from dppo_mcore.rollout.answers import RawAnswer
from dppo_mcore.rollout.base import EngineError, GenerationRequest, Sampling, TensorMeta
from dppo_mcore.rollout.sglang_options import sampling_params
from dppo_mcore.rollout.sidecar_client import CONTROL_S, EngineDied, Refused
from dppo_mcore.types import Prompt

KEY_VARIABLE = "DPPO_ENGINE_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENGINE_PREFIXES = ("model.layers.", "model.embed_tokens.", "model.norm.", "visual.", "lm_head.")
WAIT_S = 300.0


def check_url(url: str, key: str) -> str:
    """The URL without a trailing slash; refused unless it is on this machine or a key goes with it."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineError(f"rollout_url: {url!r} is not an http(s) URL")
    if parts.hostname not in LOOPBACK and not key:
        raise EngineError(
            f"rollout_url: {parts.hostname} is another machine; set {KEY_VARIABLE} to the engine's API key"
        )
    return url.rstrip("/")


def check_names(metas: Sequence[TensorMeta]) -> None:
    """Refuse names the server doesn't know: it would end on them."""
    for meta in metas:
        if not meta.name.startswith(ENGINE_PREFIXES):
            raise EngineError(
                f"weight sync: {meta.name} is no name SGLang knows (model.*, visual.*, lm_head.*); not sent"
            )


class HttpClient:
    """`EngineClient` over HTTP; one blocking request per answer, on a pool of threads."""

    patience_s = 600.0
    """What a call may take that moves weights or memory, or scores."""

    def __init__(self, url: str, timeout_s: float, max_in_flight: int) -> None:
        self._key = os.environ.get(KEY_VARIABLE, "")
        self.url = check_url(url, self._key)
        self.timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(max_in_flight, thread_name_prefix="engine-http")
        self._scores = itertools.count()
        self._paused = False
        self.tensor_parallel = 1
        self._wait_until_up()
        self.check_server()

    def check_server(self) -> None:
        """Refuse a server that couldn't take weights."""
        information = self.get("/server_info")
        if information.get("dp_size", 1) != 1:
            raise EngineError(
                f"rollout_url: {self.url} runs {information['dp_size']} data-parallel replicas, which take no weight "
                "updates; run one server per replica"
            )
        self.tensor_parallel = int(information.get("tp_size", 1))

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.alive():
            if time.monotonic() > deadline:
                raise EngineError(f"rollout_url: nothing answers at {self.url}")
            time.sleep(1.0)

    def get(self, path: str, timeout_s: float = 10.0) -> dict[str, Any]:
        """GET, JSON or empty."""
        return self._request("GET", path, None, timeout_s)

    def post(self, path: str, timeout_s: float | None = None, **body: Any) -> dict[str, Any]:
        """POST a JSON object. `Refused` on 4xx, `EngineDied` when nobody answers."""
        return self._request("POST", path, body, self.patience_s if timeout_s is None else timeout_s)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:500]
            if error.code < 500:
                raise Refused(f"{path}: {error.code} {detail}") from None
            raise RuntimeError(f"{path}: {error.code} {detail}") from None
        except (urllib.error.URLError, OSError) as error:
            raise EngineDied(f"{self.url}{path}: {error}") from None
        try:
            return json.loads(text) if text else {}
        except ValueError:
            return {}

    def submit(
        self, rid: str, request: GenerationRequest, index: int, sampling: Sampling, media: Any
    ) -> Future[RawAnswer]:
        """One answer."""
        return self._pool.submit(self.generate, rid, request, index, sampling)

    def generate(self, rid: str, request: GenerationRequest, index: int, sampling: Sampling) -> RawAnswer:
        """The same, waiting for it."""
        prefix = request.prefixes.get(index)
        ids = [*request.prompt.token_ids, *(prefix.token_ids if prefix else ())]
        params = sampling_params(sampling, request.token_seed(index), request.room(index, sampling))
        reply = self.post(
            "/generate", self.timeout_s, rid=rid, input_ids=ids, sampling_params=params, return_logprob=True
        )
        meta = reply["meta_info"]
        finish = meta["finish_reason"]
        return RawAnswer(
            token_ids=tuple(reply["output_ids"]),
            logprobs=tuple(float(entry[0]) for entry in meta["output_token_logprobs"]),
            finish=finish["type"],
            versions=tuple((_number(v["version"]), v["start"], v["end"]) for v in meta.get("weight_versions") or ()),
        )

    def score(self, prompt: Prompt, answer: Sequence[int], media: Any) -> list[float]:
        """Log-probs [len(answer)]."""
        reply = self.post(
            "/generate",
            rid=f"score#{next(self._scores)}",
            input_ids=[*prompt.token_ids, *answer],
            sampling_params={"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=len(prompt.token_ids) - 1,
        )
        return [float(entry[0]) for entry in reply["meta_info"]["input_token_logprobs"][1:]]

    def share(self, prompt: Prompt, embeddings_MH: Tensor | None, positions_3L: Tensor) -> Any:
        """Refused: an expanded prompt beside a raw image would never be answered and block every later update."""
        raise EngineError(
            f"sample {prompt.sample.id}: it has media, and an engine given by rollout_url takes text only; "
            "leave rollout_url empty, so that an engine is started that takes the trainer's embeddings"
        )

    def abort(self, rid: str | None = None) -> None:
        """End one request, or all."""
        self.post("/abort_request", CONTROL_S, **({"abort_all": True} if rid is None else {"rid": rid}))

    def pause(self) -> None:
        """Hold running requests; their cache goes."""
        self.post("/pause_generation", CONTROL_S, mode="retract")
        self._paused = True

    def resume(self) -> None:
        """Let them go on."""
        self.post("/continue_generation", CONTROL_S)
        self._paused = False

    def flush(self) -> None:
        """Empty the cache. Right after a response the server still counts it as running, so ask more than once."""
        for attempt in range(20):
            try:
                self.post("/flush_cache?timeout=5", CONTROL_S)
                return
            except Refused:
                if attempt == 19:
                    raise
                time.sleep(0.25)

    def sleep(self, tags: Sequence[str]) -> None:
        """Release memory, once the server is idle; asked earlier it would end."""
        self.flush()
        self.post("/release_memory_occupation", tags=list(tags))

    def wake(self, tags: Sequence[str]) -> None:
        """Take it again."""
        self.post("/resume_memory_occupation", tags=list(tags))

    def alive(self) -> bool:
        """Whether it answers."""
        try:
            self.get("/health")
            return True
        except (EngineDied, Refused, RuntimeError):
            return False

    def close(self) -> None:
        """Leave the server as it is."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class HttpReceiver:
    """The weight side of a server given by URL."""

    transports = frozenset({"ipc", "distributed", "disk"})
    wants_vision = False

    def __init__(self, client: Callable[[], HttpClient]) -> None:
        self._client = client
        self._version = -1

    def begin(self, version: int) -> None:
        """Hold requests, open the session; one that a killed trainer left open is closed first."""
        self._version = version
        self._client().pause()
        try:
            self._client().post("/begin_weight_update")
        except Refused:
            self._client().post("/end_weight_update")
            self._client().post("/begin_weight_update")

    def load_shared(self, metas: Sequence[TensorMeta], handle: Mapping[str, Any]) -> None:
        """One bucket inside the request: a plain pickle of tensors, which needs nothing shared with the server."""
        check_names(metas)
        flat = wire.attach(handle)
        slots = [wire.Slot.from_json(value) for value in handle["slots"]]
        payload = io.BytesIO()
        pickle.Pickler(payload, protocol=4).dump([(slot.name, slot.view(flat).clone()) for slot in slots])
        text = base64.b64encode(payload.getvalue()).decode()
        client = self._client()
        client.post(
            "/update_weights_from_tensor",
            serialized_named_tensors=[text] * client.tensor_parallel,
            flush_cache=True,
            weight_version=str(self._version),
        )

    def join_group(self, address: str, port: int, backend: str) -> Any:
        """Form the group of leader and engine ranks."""
        client = self._client()
        world = 1 + client.tensor_parallel
        body: dict[str, Any] = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world}
        body |= {"group_name": weight_group.GROUP, "backend": backend}
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(lambda: client.post("/init_weights_update_group", **body))
            group = weight_group.join(address, port, backend, 0, world)
            answer.result()
        return group

    def leave_group(self) -> None:
        """Dissolve it."""
        self._client().post("/destroy_weights_update_group", group_name=weight_group.GROUP)

    def load_broadcast(self, metas: Sequence[TensorMeta], send: Callable[[], None]) -> None:
        """One bucket by broadcast."""
        check_names(metas)
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(
                self._client().post,
                "/update_weights_from_distributed",
                names=[meta.name for meta in metas],
                dtypes=[meta.dtype for meta in metas],
                shapes=[list(meta.shape) for meta in metas],
                group_name=weight_group.GROUP,
                load_format="flattened_bucket",
                flush_cache=True,
                weight_version=str(self._version),
            )
            send()
            answer.result()

    def load_disk(self, path: str, version: int) -> None:
        """A Hugging Face directory both machines see."""
        self._client().post("/update_weights_from_disk", model_path=path, weight_version=str(version), flush_cache=True)

    def end(self, version: int) -> None:
        """Close the session and let requests go on. What older weights cached went with each bucket: a flush of its
        own, asked for while retracted requests wait, leaves SGLang 0.5.23 spinning."""
        self._client().post("/end_weight_update")
        self._client().resume()

    def fingerprints(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
        """None: a plain server has no such call; the log-prob check after the sync stands in."""
        return None


def _number(version: str) -> int:
    """A server started elsewhere calls its first weights `default`."""
    return int(version) if version.lstrip("-").isdigit() else -1
