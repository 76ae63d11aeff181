"""The teacher over real HTTP on loopback: failures of every kind, rate limits, budget, resuming; and from a file."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dppo_mcore.config import PracticeConfig
from dppo_mcore.practice import teacher_client
from dppo_mcore.practice.ledger import Ledger, PhasePlan, TeacherAnswer
from dppo_mcore.practice.prompts import INSTRUCTIONS, PromptTemplate
from dppo_mcore.practice.teacher import EndpointTeacher, FileTeacher, choose, collect, make_teacher, vote
from dppo_mcore.practice.teacher_client import ChatClient, TeacherDownError, TeacherRefusedError
from dppo_mcore.practice.teacher_media import media_parts, thin
from dppo_mcore.rewards import score
from dppo_mcore.types import Media, Sample, Turn

PHASE = "1-2 weakness"
Reply = tuple[int, dict[str, str], Any]


class Endpoint:
    """A scriptable OpenAI-compatible server: `reply(number, request)` gives status, headers and body."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append(body)
                    endpoint.headers.append((self.path, self.headers.get("Authorization")))
                    number = len(endpoint.requests) - 1
                status, headers, content = reply(number, body)
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                if status == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[int, dict[str, Any]], Reply]], Endpoint]]:
    endpoints: list[Endpoint] = []

    def start(reply: Callable[[int, dict[str, Any]], Reply]) -> Endpoint:
        endpoints.append(Endpoint(reply))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.server.shutdown()
        endpoint.server.server_close()


def said(text: str) -> Reply:
    return 200, {}, {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": 9}}


GOOD = said("<think>count</think><answer>3</answer>")


def sample(number: int = 0, **changes: Any) -> Sample:
    return Sample(f"s{number}", "counting", (Turn("user", "<image>How many?"),), gold=3, **changes)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def client(url: str, clock: Clock | None = None, **options: Any) -> ChatClient:
    clock = clock or Clock()
    return ChatClient(url, "big", sleep=clock.sleep, clock=clock, **options)


def teacher(url: str, clock: Clock | None = None, **options: Any) -> EndpointTeacher:
    return EndpointTeacher(client(url, clock, **options), lambda _: [], max_tokens=64, temperature=0.5)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_samples([sample(i) for i in range(20)], "rl")
    ledger.plan([PhasePlan(PHASE, 1, "weakness")])
    yield ledger
    ledger.close()


def scores(tasks: Any) -> Any:
    return [score(one, text) for one, text in tasks]


def test_request_and_answer(serve: Any) -> None:
    endpoint = serve(lambda *_: GOOD)
    chat = client(endpoint.url + "/v1/", key="secret")
    assert chat.chat([{"role": "user", "content": "hi"}], 32, 0.2, seed=5) == (
        "<think>count</think><answer>3</answer>",
        9,
    )
    assert endpoint.headers == [("/v1/chat/completions", "Bearer secret")]
    assert endpoint.requests[0] == {
        "model": "big", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 32, "temperature": 0.2,
        "seed": 5,
    }  # fmt: skip
    assert "secret" not in repr(chat)


def test_separate_reasoning_becomes_the_thought(serve: Any) -> None:
    message = {"content": "<answer>3</answer>", "reasoning_content": " I count three. "}
    endpoint = serve(lambda *_: (200, {}, {"choices": [{"message": message}]}))
    assert client(endpoint.url).chat([], 1, 0)[0] == "<think>I count three.</think>\n<answer>3</answer>"


@pytest.mark.parametrize(
    "failure",
    [
        (500, {}, {"error": "boom"}), (503, {}, b""), (429, {}, {"error": "slow down"}), (200, {}, b"not json"),
        (200, {}, {"choices": []}), said(""), (200, {}, [1]), (0, {}, b""), (408, {}, b""), (200, {}, b"\xff\xfe"),
    ],
)  # fmt: skip
def test_passing_failures_are_tried_again(serve: Any, failure: Reply) -> None:
    endpoint = serve(lambda number, _: failure if number < 3 else GOOD)
    clock = Clock()
    assert client(endpoint.url, clock).chat([], 1, 0)[1] == 9
    assert len(endpoint.requests) == 4
    # Pauses of 1, 2 and 4 seconds, each with jitter between a half and the whole.
    assert [0.5 * 2**i <= pause <= 2**i for i, pause in enumerate(clock.slept)] == [True] * 3


def test_retry_after_holds_every_thread_back(serve: Any) -> None:
    endpoint = serve(lambda number, _: (429, {"Retry-After": "30"}, b"") if number == 0 else GOOD)
    clock = Clock()
    client(endpoint.url, clock).chat([], 1, 0)
    assert clock.now >= 30


def test_rate_limit(serve: Any) -> None:
    endpoint = serve(lambda *_: GOOD)
    clock = Clock()
    limited = client(endpoint.url, clock, requests_per_minute=6)
    for _ in range(4):
        limited.chat([], 1, 0)
    assert clock.now == pytest.approx(30)


def test_an_hour_of_failures_and_the_teacher_counts_as_down(serve: Any) -> None:
    endpoint = serve(lambda *_: (503, {}, b"overloaded"))
    clock = Clock()
    with pytest.raises(TeacherDownError, match="failed for 3600 s, last: HTTP 503: overloaded"):
        client(endpoint.url, clock).chat([], 1, 0)
    assert 3600 <= clock.now < 3700
    assert len(endpoint.requests) < 150


def test_wrong_key_is_down_at_once_and_a_bad_request_a_refusal(serve: Any) -> None:
    denied = serve(lambda *_: (401, {}, {"error": "no such key"}))
    with pytest.raises(TeacherDownError, match="HTTP 401"):
        client(denied.url).chat([], 1, 0)
    refused = serve(lambda *_: (400, {}, {"error": "image too large"}))
    with pytest.raises(TeacherRefusedError, match="image too large"):
        client(refused.url).chat([], 1, 0)


def test_nobody_listens() -> None:
    with pytest.raises(TeacherDownError, match="ConnectionRefusedError"):
        client("http://127.0.0.1:9", patience_s=20).chat([], 1, 0)
    with pytest.raises(ValueError, match="teacher_url"):
        client("localhost:8000")


def test_slow_answers_time_out(serve: Any) -> None:
    def reply(number: int, _: Any) -> Reply:
        if number == 0:
            time.sleep(1.0)
        return GOOD

    endpoint = serve(reply)
    assert client(endpoint.url, timeout_s=0.3).chat([], 1, 0)[1] == 9
    assert len(endpoint.requests) == 2


def test_collect_verifies_and_keeps_the_shortest_right_answer(ledger: Ledger, serve: Any) -> None:
    answers = [
        "<think>I count one, two, three, slowly</think><answer>3</answer>",
        "<think>a guess</think><answer>9</answer>",
        "<think>three</think><answer>3</answer>",
    ]
    endpoint = serve(lambda _, body: said(answers[body["seed"]]))
    result = collect(ledger, PHASE, [sample(0), sample(1)], teacher(endpoint.url), scores, answers=3)
    assert (result.asked, result.missing) == (6, 0)
    given = ledger.teacher_answers(PHASE, "s0")
    assert [(a.success, a.kept, a.tokens) for a in given] == [(True, False, 9), (False, False, 9), (True, True, 9)]
    assert "The right answer" not in json.dumps(endpoint.requests) and "How many?" in json.dumps(endpoint.requests)


def test_second_round_shows_the_gold_answer(ledger: Ledger, serve: Any) -> None:
    def reply(_: int, body: dict[str, Any]) -> Reply:
        shown = "The right answer is: 3" in json.dumps(body)
        return GOOD if shown else said("<think>?</think><answer>9</answer>")

    endpoint = serve(reply)
    result = collect(ledger, PHASE, [sample(0)], teacher(endpoint.url), scores, answers=2, show_gold=True)
    assert (result.asked, result.missing) == (3, 0)
    assert [(a.round, a.index, a.kept) for a in ledger.teacher_answers(PHASE)] == [
        (0, 0, False), (0, 1, False), (1, 0, True),
    ]  # fmt: skip


def test_the_teacher_is_told_how_its_answer_is_scored(ledger: Ledger, serve: Any, tmp_path: Path) -> None:
    """The objective's instruction follows the question, once, in both rounds, and in what is learnt from the answer."""
    endpoint = serve(lambda *_: said("<think>?</think><answer>(99, 99)</answer>"))
    template = PromptTemplate()
    config = PracticeConfig(teacher_url=endpoint.url, teacher_model="big")
    made = make_teacher(config, lambda _: [], instructions=template.instructions)
    assert made is not None
    where = Sample("s0", "affordance", (Turn("system", "mine"), Turn("user", "Where?")), gold=[[0, 0], [1, 0], [1, 1]])
    collect(ledger, PHASE, [where, sample(1)], made, scores, answers=1, show_gold=True)
    asked = [request["messages"] for request in endpoint.requests]
    texts = [messages[-1]["content"][-1]["text"] for messages in asked]
    instruction = INSTRUCTIONS["affordance"]
    assert sorted(text.split("\n\n")[0] for text in texts) == sorted(
        [f"Where?\n{instruction}"] * 2 + [f"How many?\n{INSTRUCTIONS['counting']}"] * 2
    )
    assert all(len(messages) == 1 for messages in asked)  # no system prompt, the model's own neither
    assert sum("The right answer is" in text for text in texts) == 2
    # The lesson made from an answer has the question as the model is asked it, the instruction once.
    assert template.apply(where).turns[-1].content == f"Where?\n{instruction}"
    assert "share of" not in ledger.teacher_answers(PHASE, "s0")[0].text
    silent = make_teacher(config, lambda _: [], instructions={"counting": ""})
    assert silent is not None
    silent.answer(sample(2), 0, 0)
    assert endpoint.requests[-1]["messages"][-1]["content"][-1]["text"].startswith("How many?\n\n")


def test_down_half_way_then_resumed(ledger: Ledger, serve: Any) -> None:
    """The phase ends with what there is and says what is missing; later only that is asked for."""
    up = [True]

    def reply(number: int, _: Any) -> Reply:
        return GOOD if number < 7 or not up[0] else (503, {}, b"gone")

    endpoint = serve(reply)
    samples = [sample(i) for i in range(10)]
    first = collect(ledger, PHASE, samples, teacher(endpoint.url), scores, answers=2, concurrency=3)
    assert first.asked == 7 and first.missing >= 6
    assert "failed for" in first.reason or "given up" in first.reason
    assert len(ledger.teacher_answers(PHASE)) == 7
    up[0] = False
    second = collect(ledger, PHASE, samples, teacher(endpoint.url), scores, answers=2, concurrency=3)
    assert (second.asked, second.missing, second.reason) == (13, 0, "")
    keys = Counter((a.sample_id, a.round, a.index) for a in ledger.teacher_answers(PHASE))
    assert len(keys) == 20 and set(keys.values()) == {1}
    assert collect(ledger, PHASE, samples, teacher(endpoint.url), scores, answers=2).asked == 0


def test_one_poisoned_sample_does_not_stop_the_others(ledger: Ledger, serve: Any) -> None:
    """The server fails on one question for ever while it answers all others."""

    def reply(_: int, body: dict[str, Any]) -> Reply:
        return (500, {}, b"cannot decode") if "poison" in json.dumps(body) else GOOD

    endpoint = serve(reply)
    poisoned = Sample("s0", "counting", (Turn("user", "poison"),), gold=3)
    patient = teacher(endpoint.url, Clock(), attempts_per_request=4)
    result = collect(ledger, PHASE, [poisoned, *[sample(i) for i in range(1, 20)]], patient, scores, answers=4)
    assert result.missing == 1 and "cannot decode" in result.reason
    assert ledger.teacher_answers(PHASE, "s0") == []
    assert sum(a.success for a in ledger.teacher_answers(PHASE)) == 76


def test_budget_over_the_run(ledger: Ledger, serve: Any) -> None:
    endpoint = serve(lambda *_: GOOD)
    samples = [sample(i) for i in range(5)]
    first = collect(ledger, PHASE, samples, teacher(endpoint.url), scores, answers=2, budget=6)
    assert (first.asked, first.missing, first.reason) == (6, 2, "the teacher's budget of 6 requests is spent")
    assert collect(ledger, PHASE, samples, teacher(endpoint.url), scores, answers=2, budget=6).asked == 0
    assert len(endpoint.requests) == 6


def test_nonsense_is_recorded_and_never_kept(ledger: Ledger, serve: Any) -> None:
    endpoint = serve(lambda *_: said("\u0000 lorem ipsum <answer>" * 50))
    result = collect(ledger, PHASE, [sample(0)], teacher(endpoint.url), scores, answers=4)
    assert result.missing == 0
    assert not any(a.kept or a.success for a in ledger.teacher_answers(PHASE))


def test_from_a_file(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [
        {"id": "s0", "answer": ["<think>a</think><answer>9</answer>", "<think>b</think><answer>3</answer>"]},
        {"id": "s1", "answer": "<think>c</think><answer>3</answer>"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    result = collect(ledger, PHASE, [sample(i) for i in range(3)], FileTeacher(str(path)), scores, show_gold=True)
    assert (result.asked, result.missing, result.reason) == (3, 1, "answers.jsonl has no answer to them")
    assert [(a.sample_id, a.index) for a in ledger.teacher_answers(PHASE) if a.kept] == [("s0", 1), ("s1", 0)]
    path.write_text('{"id": "s0"}\n')
    with pytest.raises(ValueError, match="teacher_file .*:1: a row is"):
        FileTeacher(str(path))


def test_the_configured_teacher(tmp_path: Path) -> None:
    assert make_teacher(PracticeConfig(), lambda _: []) is None
    path = tmp_path / "answers.jsonl"
    path.write_text("")
    assert isinstance(make_teacher(PracticeConfig(teacher_file=str(path)), lambda _: []), FileTeacher)
    config = PracticeConfig(teacher_url="http://127.0.0.1:9/v1", teacher_model="big", teacher_patience_s=0.0)
    asked = make_teacher(config, lambda _: [], "secret")
    assert isinstance(asked, EndpointTeacher) and asked.model == "big"
    with pytest.raises(TeacherDownError):
        asked.answer(sample(), 0, 0)


def test_vote() -> None:
    answers = [
        TeacherAnswer("s0", 0, i, "big", f"<answer>{value}</answer>", 1.0, value == "3", False, None, 1)
        for i, value in enumerate("3995")
    ]
    assert [a.index for a in vote(answers, 0.5)] == [1, 2]
    assert choose(vote(answers, 0.5)) == {}
    assert choose(vote(answers, 0.25))["s0"].index == 0


def test_media_parts(tmp_path: Path) -> None:
    clip_THWC = np.zeros((100, 8, 8, 3), dtype=np.uint8)
    assert len(thin(clip_THWC, 16)) == 16
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"video")
    shown = sample(media=(Media("video", str(video)),))
    frames = media_parts("frames", lambda _: [clip_THWC], 4)(shown)
    assert len(frames) == 4 and frames[0]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert media_parts("video", lambda _: [clip_THWC])(shown) == [
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,dmlkZW8="}}
    ]
    cut = sample(media=(Media("video", str(video), 1.0, 2.0),))
    assert media_parts("video", lambda _: [clip_THWC], 2)(cut)[0]["type"] == "image_url"
    assert media_parts("frames", lambda _: [])(sample()) == []


class Trickle:
    """A server whose answer never ends: a byte every now and then, or as many as it can send."""

    def __init__(self, chunk: bytes, pause: float) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.connections = 0

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = self.socket.accept()
                    self.connections += 1
                    threading.Thread(target=send, args=(connection,), daemon=True).start()

        def send(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
                while True:
                    connection.sendall(chunk)
                    time.sleep(pause)

        threading.Thread(target=serve, daemon=True).start()


@pytest.mark.parametrize(("chunk", "pause"), [(b" ", 0.05), (b" " * 2**20, 0.0)])
def test_an_answer_that_never_ends(chunk: bytes, pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, the answer doesn't."""
    monkeypatch.setattr(teacher_client, "MOST_BYTES", 2**22)
    server, clock = Trickle(chunk, pause), Clock()
    began = time.monotonic()
    with pytest.raises(TeacherDownError, match="no answer in time|a response of 4194304 bytes"):
        client(server.url, clock, timeout_s=0.5, patience_s=2).chat([], 1, 0)
    assert time.monotonic() - began < 30 and server.connections >= 2
    server.socket.close()


@pytest.mark.parametrize("status", [301, 307, 404, 405, 418])
def test_a_status_that_holds_for_all_samples_is_no_refusal(serve: Any, status: int) -> None:
    endpoint = serve(lambda *_: (status, {"Location": "https://elsewhere/v1"}, b""))
    with pytest.raises(TeacherDownError, match=f"HTTP {status}: https://elsewhere"):
        client(endpoint.url).chat([], 1, 0)
    assert len(endpoint.requests) == 1


def test_refusing_everything_says_nothing_about_samples(ledger: Ledger, serve: Any) -> None:
    """A parameter the endpoint doesn't know: mended, the same samples are asked for again."""
    wrong = [True]

    def reply(number: int, body: dict[str, Any]) -> Reply:
        return (400, {}, {"error": "unknown parameter"}) if wrong[0] or "poison" in json.dumps(body) else GOOD

    endpoint = serve(reply)
    samples = [*(sample(i) for i in range(1, 20)), Sample("s0", "counting", (Turn("user", "poison"),), gold=3)]
    first = collect(ledger, PHASE, samples, teacher(endpoint.url), scores, answers=4, concurrency=2)
    assert (first.asked, first.missing) == (0, 20) and "unknown parameter" in first.reason
    assert 32 <= len(endpoint.requests) < 76  # it gave up before all were tried
    assert ledger.teacher_answers(PHASE) == []
    wrong[0] = False
    second = collect(ledger, PHASE, samples, teacher(endpoint.url), scores, answers=4, concurrency=2)
    assert (second.asked, second.missing) == (80, 0)
    refused = ledger.teacher_answers(PHASE, "s0")
    assert len(refused) == 4 and all("unknown parameter" in (a.error or "") for a in refused)


def test_media_that_cannot_be_read_are_given_up_for_now(ledger: Ledger, serve: Any, tmp_path: Path) -> None:
    endpoint = serve(lambda *_: GOOD)
    clip = tmp_path / "clip.mp4"
    samples = [sample(0, media=(Media("video", str(clip)),)), sample(1)]
    watching = EndpointTeacher(client(endpoint.url), media_parts("video", lambda _: []), max_tokens=4, temperature=0)
    first = collect(ledger, PHASE, samples, watching, scores, answers=1)
    assert (first.asked, first.missing) == (1, 1) and "media of s0 can't be read" in first.reason
    clip.write_bytes(b"there again")
    assert collect(ledger, PHASE, samples, watching, scores, answers=1).missing == 0


def test_a_stop_does_not_wait_for_the_teacher(ledger: Ledger, serve: Any) -> None:
    def reply(number: int, _: Any) -> Reply:
        if number >= 3:
            time.sleep(20)
        return GOOD

    endpoint, began = serve(reply), time.monotonic()
    result = collect(
        ledger, PHASE, [sample(i) for i in range(8)], teacher(endpoint.url), scores, answers=1, concurrency=2,
        stopped=lambda: len(endpoint.requests) > 3,
    )  # fmt: skip
    assert time.monotonic() - began < 15
    assert result.missing >= 5 and result.reason == "the run was asked to stop"
    assert len(ledger.teacher_answers(PHASE)) == result.asked == 8 - result.missing
