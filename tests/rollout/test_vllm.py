"""The vLLM adapter against the protocol suite, with a stand-in server that speaks the routes it uses."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from dppo_mcore.model.config import load_qwen_config
from dppo_mcore.rollout import engine_loader, wire
from dppo_mcore.rollout.base import EngineError, GenerationRequest
from dppo_mcore.rollout.vllm import VllmEngine
from tests.rollout import cases, protocol

EOS = 592


class StandIn(BaseHTTPRequestHandler):
    """Random tokens by seed, and a record of the control calls."""

    calls: list[tuple[str, dict]] = []

    def do_GET(self) -> None:
        """Health and models."""
        self._reply({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        """Completions; everything else is recorded."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path != "/v1/completions":
            self.calls.append((self.path, body))
            return self._reply({})
        dice = random.Random(body["seed"])
        allowed = [token for token in [*range(5, 40), EOS] if str(token) not in body["logit_bias"]]
        ids: list[int] = []
        while len(ids) < body["max_tokens"] and EOS not in ids:
            ids.append(dice.choice(allowed))
        finish = "stop" if EOS in ids else "length"
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * len(ids)}, "finish_reason": finish}
        return self._reply({"choices": [choice]})

    def _reply(self, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def engine(tiny_dir: str, tmp_path: Path) -> Iterator[VllmEngine]:
    """The adapter, connected to the stand-in."""
    StandIn.calls.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    config = cases.config(tiny_dir, str(tmp_path), rollout_url=url, rollout_engine="vllm", rollout_max_in_flight=4)
    made = VllmEngine(config, load_qwen_config(tiny_dir), [], cases.Spelling())
    made.start()
    yield made
    made.stop()
    made.stop()
    server.shutdown()


def test_the_protocol(engine: VllmEngine) -> None:
    """As for every engine."""
    engine.update_weights(5, lambda: None)
    protocol.check_protocol(engine, EOS)


def test_an_update_holds_requests_and_drops_the_cache(engine: VllmEngine) -> None:
    """In this order, with the version counted on our side."""
    receiver = engine.receiver
    assert receiver is not None
    engine.update_weights(9, lambda: receiver.load_disk("/weights", 9))
    assert [path for path, _ in StandIn.calls] == [
        "/pause?mode=wait",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/resume",
    ]
    assert StandIn.calls[1][1] == {"method": "reload_weights", "kwargs": {"weights_path": "/weights"}}
    assert engine.weight_version == 9


def test_what_it_cannot_do_is_said(engine: VllmEngine, tiny_dir: str) -> None:
    """Media, groups, and a missing URL."""
    clip = cases.mixed(engine.qwen)[1]
    with pytest.raises(EngineError, match="takes text only"):
        list(engine.generate([GenerationRequest("clip", clip, 1)], protocol.Sampling()))
    with pytest.raises(EngineError, match="use ipc or disk"):
        engine.receiver.join_group("127.0.0.1", 1, "nccl")  # type: ignore[union-attr]
    with pytest.raises(EngineError, match="give its URL"):
        VllmEngine(cases.config(tiny_dir, "run"), engine.qwen, [], cases.Spelling())


def test_a_restarted_server_makes_its_side_of_the_transfer_again(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each server, not for each update."""
    monkeypatch.setattr(engine_loader, "cuda_buffer", lambda handle: torch.zeros(64, dtype=torch.uint8))
    monkeypatch.setattr(torch.multiprocessing.reductions, "reduce_tensor", lambda tensor: "opened by vLLM")
    slots, _ = wire.lay_out([("norm.weight", "float32", (4,))])
    handle = {"cuda": {"uuid": "GPU-0"}, "slots": [slot.to_json() for slot in slots]}
    receiver = engine.receiver
    assert receiver is not None
    for version in (1, 2):
        engine.update_weights(version, lambda: receiver.load_shared([], handle))
    assert engine._restart("it was lost") == ""
    engine.update_weights(3, lambda: receiver.load_shared([], handle))
    made = [path for path, _ in StandIn.calls if path in ("/init_weight_transfer_engine", "/update_weights")]
    assert made == ["/init_weight_transfer_engine", "/update_weights", "/update_weights"] + made[:2]
