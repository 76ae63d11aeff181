"""A real SGLang server given by URL, and every guard that keeps the client from killing or blocking it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dppo_mcore.model.config import load_qwen_config
from dppo_mcore.model.weight_map import canonical_name
from dppo_mcore.rollout import wire
from dppo_mcore.rollout.answers import RawAnswer
from dppo_mcore.rollout.base import EngineError, GenerationRequest, Sampling, TensorMeta
from dppo_mcore.rollout.http import HttpClient, HttpReceiver, check_url
from dppo_mcore.rollout.sidecar_client import CONTROL_S, EngineDied, Refused
from dppo_mcore.types import Prompt, Sample
from tests.rollout import cases
from tests.support.sglang_server import HttpServer

REQUEST = GenerationRequest("s", Prompt(Sample("s", "exact", ()), (1, 2, 3, 4, 5)), 1)
GREEDY = Sampling(temperature=0.0, max_tokens=6)
LONG = Sampling(temperature=1.0, max_tokens=200, banned_token_ids=tuple(range(590, 640)))


@pytest.fixture
def client(sglang_server: HttpServer) -> Iterator[HttpClient]:
    """A client of the session's server, which must be able to answer: hung by one test, it fails the next at once."""
    made = HttpClient(sglang_server.url, 180.0, 8)
    made.patience_s = 120.0
    made.post("/generate", CONTROL_S, input_ids=[1, 2], sampling_params={"max_new_tokens": 1})
    yield made
    made.close()


def ids(client: HttpClient) -> tuple[int, ...]:
    """A greedy answer."""
    return client.submit(f"r{time.monotonic_ns()}", REQUEST, 0, GREEDY, None).result(60).token_ids


def weights(folder: str, scale: float) -> dict[str, torch.Tensor]:
    """The checkpoint's language weights, scaled."""
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= {canonical_name(name): tensor for name, tensor in load_file(file).items()}
    return {name: tensor * scale for name, tensor in tensors.items() if not name.startswith("visual.")}


def push(client: HttpClient, tensors: dict[str, torch.Tensor], version: int) -> None:
    """One update inside the request."""
    receiver = HttpReceiver(lambda: client)
    buffer, handle = wire.share(tensors)
    metas = [TensorMeta(name, wire.dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    receiver.begin(version)
    try:
        receiver.load_shared(metas, handle)
    finally:
        receiver.end(version)
        buffer.close()


def until_it_runs(client: HttpClient, running: Future[RawAnswer]) -> None:
    """Returns once the server works on a request: it then refuses to drop its cache."""
    while not running.done():
        try:
            client.post("/flush_cache")
        except Refused:
            return
        time.sleep(0.02)
    pytest.fail(f"the request ended first: {running.result()}")


@pytest.mark.sglang
def test_answers_and_updates(client: HttpClient, tiny_dir: str) -> None:
    """Answers carry the version of the weights they came from; other weights, other answers, and back."""
    first = ids(client)
    push(client, weights(tiny_dir, 1.5), 7)
    raw = client.submit("v", REQUEST, 0, GREEDY, None).result(60)
    assert raw.versions == ((7, 0, len(raw.token_ids)),)
    assert len(raw.logprobs) == len(raw.token_ids)
    push(client, weights(tiny_dir, 1.0), 8)
    assert ids(client) == first


@pytest.mark.sglang
def test_names_that_would_kill_the_server_are_not_sent(client: HttpClient, sglang_server: HttpServer) -> None:
    """The newer prefixes; the server lives, and the update that was open is closed."""
    for name in ("model.language_model.norm.weight", "model.visual.merger.ln_q.weight"):
        with pytest.raises(EngineError, match=f"{name} is no name SGLang knows"):
            push(client, {name: torch.ones(128)}, 9)
    assert sglang_server.alive
    assert ids(client)


@pytest.mark.sglang
def test_media_are_refused_before_they_could_block_it(client: HttpClient, tiny_dir: str) -> None:
    """An expanded prompt with a raw image beside it would never return."""
    prompt = cases.mixed(load_qwen_config(tiny_dir))[1]
    with pytest.raises(EngineError, match="takes text only"):
        client.share(prompt, None, torch.zeros(3, 1))


@pytest.mark.sglang
def test_sleeping_right_after_an_answer(client: HttpClient, sglang_server: HttpServer) -> None:
    """The client waits until the server is idle; asked at once, the server would end."""
    for tags in (["kv_cache"], ["weights", "kv_cache"]):
        ids(client)
        client.sleep(tags)
        client.wake(tags)
    assert sglang_server.alive
    assert ids(client)


@pytest.mark.sglang
def test_an_update_outside_a_session_or_from_nowhere_is_refused(client: HttpClient) -> None:
    """Both answer 400, and change nothing."""
    before = ids(client)
    with pytest.raises(Refused, match="begin_weight_update"):
        client.post("/update_weights_from_distributed", names=[], dtypes=[], shapes=[])
    with pytest.raises(Refused, match="400"):
        client.post("/update_weights_from_disk", model_path="/nowhere/at/all")
    assert ids(client) == before


@pytest.mark.sglang
def test_an_update_that_a_killed_trainer_left_open_is_closed(client: HttpClient, tiny_dir: str) -> None:
    """Else no trainer could ever give this server weights again."""
    before = ids(client)
    HttpReceiver(lambda: client).begin(20)
    push(client, weights(tiny_dir, 1.0), 21)
    assert ids(client) == before


@pytest.mark.sglang
def test_a_refused_flush_is_an_error(client: HttpClient) -> None:
    """While a request runs the cache stays, and the client says so."""
    running = client.submit("long", REQUEST, 0, LONG, None)
    until_it_runs(client, running)
    assert len(running.result(170).token_ids) == 200


@pytest.mark.sglang
def test_held_requests_go_on_under_new_weights(client: HttpClient, tiny_dir: str) -> None:
    """Their versions show the split."""
    running = client.submit("split", REQUEST, 0, LONG, None)
    until_it_runs(client, running)
    push(client, weights(tiny_dir, 1.0), 22)
    push(client, weights(tiny_dir, 1.0), 23)
    versions = running.result(170).versions
    assert versions[-1][0] == 23
    assert len(versions) >= 2


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("ftp://x", "", "not an http"),
        ("http://example.org:1", "", "is another machine"),
        ("nonsense", "", "not an http"),
    ],
)
def test_urls_are_checked(url: str, key: str, message: str) -> None:
    """Loopback, or a key."""
    with pytest.raises(EngineError, match=message):
        check_url(url, key)
    assert check_url("http://example.org:1/", "secret") == "http://example.org:1"
    assert check_url("http://127.0.0.1:1/", "") == "http://127.0.0.1:1"


class Peer(BaseHTTPRequestHandler):
    """A server that answers what it is told to."""

    answers: dict[str, object] = {}

    def do_GET(self) -> None:
        """Look the path up."""
        body = json.dumps(self.answers.get(self.path, {})).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.mark.sglang
def test_the_real_server_says_how_many_replicas_it_runs(client: HttpClient) -> None:
    """Under the names the check below reads."""
    information = client.get("/server_info")
    assert (information["dp_size"], information["tp_size"]) == (1, client.tensor_parallel)


def test_a_server_of_several_replicas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take no updates."""
    monkeypatch.setattr(Peer, "answers", {"/server_info": {"dp_size": 2}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(EngineError, match="2 data-parallel replicas"):
        HttpClient(f"http://127.0.0.1:{server.server_port}", 5.0, 1)
    server.shutdown()


def test_nobody_there_is_an_engine_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a crash of ours."""
    client = HttpClient.__new__(HttpClient)
    client.url, client._key, client._pool = "http://127.0.0.1:9", "", ThreadPoolExecutor(1)
    with pytest.raises(EngineDied):
        client.get("/health")
    assert not client.alive()
