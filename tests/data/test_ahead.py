"""Worker processes: order, bounds, crashes, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dppo_mcore.config import DataConfig
from dppo_mcore.data import ahead
from dppo_mcore.data.ahead import PromptSource
from dppo_mcore.data.cache import BoundedCache
from dppo_mcore.data.messages import Answer, Request, Task
from dppo_mcore.types import Media, Prompt, Sample, Turn
from tests.data.clips import write_clip


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    """Twenty questions about twenty clips."""
    folder = tmp_path_factory.mktemp("clips")
    made = []
    for number in range(20):
        path = write_clip(folder / f"{number}.mp4", frames=16 + number, size=(56, 56))
        sample = Sample(str(number), "success", (Turn("user", "<video>Done?"),), (Media("video", str(path)),))
        made.append(Request(sample, 32.0))
    return made


def test_stream_keeps_order_and_bound(requests: list[Request], tiny_dir: str) -> None:
    """Prompts come in the order asked for; no more than `decode_ahead` wait."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=2, decode_ahead=3, media_cache_mib=0))
    for request, (asked, prompt) in zip(requests, source.stream(iter(requests)), strict=True):
        assert asked is request and prompt is not None and prompt.sample is request.sample
        assert len(source._pending) <= 3
        assert torch.equal(prompt.media[0].patches, source.processor.prompt(request.sample, 32.0).media[0].patches)
    assert source.counts["decode/pyav"] == 20
    source.close()


def test_a_killed_worker_is_replaced(requests: list[Request], tiny_dir: str) -> None:
    """Its prompt is made again, by a fresh process."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=1, media_cache_mib=0))
    assert source.take(requests[0]) is not None
    first = source._pool._workers[0]._process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert source.take(requests[1]) is not None
    assert source._pool._workers[0]._process.pid != first.pid
    assert len(source.quarantine) == 0
    source.close()


def test_a_worker_that_can_not_be_killed_is_left_behind(
    requests: list[Request], tiny_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs in the kernel: a fresh process decodes in its place, and closing doesn't fail on it either."""
    monkeypatch.setattr(ahead, "KILL_WAIT_SECONDS", 0.1)
    source = PromptSource(tiny_dir, DataConfig(data_workers=1, media_cache_mib=0))
    worker = source._pool._workers[0]
    stuck, real = worker._process, worker.ask
    asked: list[object] = []

    def hang_once(task: Task) -> tuple[Answer, list[torch.Tensor]]:
        asked.append(task)
        if len(asked) == 1:
            raise EOFError
        return real(task)

    with monkeypatch.context() as patched:
        patched.setattr(stuck, "kill", lambda: None)
        patched.setattr(worker, "ask", hang_once)
        patched.setattr(worker, "_close_pipes", lambda: None)  # without them it would end by itself
        assert source.take(requests[0]) is not None
        assert worker._process is not stuck and stuck.poll() is None and len(asked) == 2
        worker._process, fresh = stuck, worker._process
        source.close()
    for process in (stuck, fresh):
        process.kill()
        process.wait()


def test_a_clip_that_crashes_decoders_is_quarantined(requests: list[Request], tiny_dir: str) -> None:
    """Twice, and the sample is out; the next one goes on."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=1, media_cache_mib=0))
    worker = source._pool._workers[0]
    real = worker.ask

    def crash(task: object) -> None:
        os.kill(worker._process.pid, signal.SIGKILL) if worker._process else None
        raise EOFError

    worker.ask = crash
    assert source.take(requests[2]) is None
    worker.ask = real
    assert source.take(requests[3]) is not None
    assert [(d.sample_id, d.reason) for d in source.quarantine.entries()] == [("2", "decoder crashed")]
    source.close()


def test_workers_end_with_their_owner(tiny_dir: str) -> None:
    """Closing ends the processes."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=2))
    processes = [worker._process for worker in source._pool._workers]
    source.close()
    deadline = time.time() + 10
    while any(process.poll() is None for process in processes) and time.time() < deadline:
        time.sleep(0.05)
    assert all(process.poll() is not None for process in processes)


def test_second_take_comes_from_the_cache(requests: list[Request], tiny_dir: str) -> None:
    """Decoded once, however often it is asked for."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=1, media_cache_mib=8))
    first = source.take(requests[0])
    again = source.take(requests[0])
    assert torch.equal(first.media[0].patches, again.media[0].patches)
    assert source.counts["decode/pyav"] == 1 and source.counts["decode/cached"] == 1
    source.close()


def test_a_broken_prompt_is_quarantined_by_sample(tiny_dir: str, tmp_path: Path) -> None:
    """Media tokens in a question make the sample unusable, and say so."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=0))
    sample = Sample("sly", "exact", (Turn("user", "What is <|video_pad|>?"),))
    assert source.take(Request(sample)) is None
    (damage,) = source.quarantine.entries()
    assert damage.sample_id == "sly" and "<|video_pad|>" in damage.detail


def test_two_manifests_may_share_an_id(requests: list[Request], tiny_dir: str) -> None:
    """Announced together, each gets its own clip and words."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=1, media_cache_mib=0))
    other = replace(requests[1], sample=replace(requests[1].sample, id=requests[0].sample.id))
    source.prefetch([requests[0], other])
    for request in (other, requests[0]):
        prompt = source.take(request)
        assert [media.plan.path for media in prompt.media] == [media.path for media in request.sample.media]
    source.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_conversation_may_lose_its_last_medium(requests: list[Request], tiny_dir: str, workers: int) -> None:
    """Cut before the second clip it comes with the first one's patches, planned or decoded by whoever does it."""
    turns = (Turn("user", "<video>Done?"), Turn("assistant", "yes"), Turn("user", "<video>And now?"))
    media = requests[0].sample.media + requests[1].sample.media
    request = Request(Sample("two", "success", turns, media), 32.0, "no")
    whole = PromptSource(tiny_dir, DataConfig(data_workers=0)).plan(request)
    limit = len(whole.token_ids) - 20
    source = PromptSource(tiny_dir, DataConfig(data_workers=workers, max_conversation_tokens=limit))
    source.plan_ahead([request])
    for prompt in (source.plan(request), source.take(request)):
        assert [medium.plan for medium in prompt.media] == [whole.media[0].plan] and len(prompt.token_ids) < limit
        assert prompt.token_ids == whole.token_ids[: len(prompt.token_ids)]
    assert prompt.media[0].patches is not None
    source.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_prompt_is_rendered_once(requests: list[Request], tiny_dir: str, workers: int) -> None:
    """What was planned is at hand when it comes again, with the new request's own sample."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=workers))
    first = source.take(requests[0])
    rendered = []
    whole = source.processor.chat.render
    source.processor.chat.render = lambda *arguments: rendered.append(1) or whole(*arguments)  # type: ignore[method-assign]
    again = replace(requests[0], sample=replace(requests[0].sample, gold="B", source="another"))
    for made in (source.plan(again), source.take(again)):
        assert made is not None and made.sample is again.sample and made.token_ids == first.token_ids
    assert torch.equal(made.media[0].patches, first.media[0].patches)
    assert not rendered
    source.take(replace(requests[0], horizon=16.0))
    assert len(rendered) == (0 if workers else 1)
    source.close()


def test_planned_prompts_are_bounded(requests: list[Request], tiny_dir: str) -> None:
    """In tokens, the least recently used first; what never fits isn't kept."""
    prompt = PromptSource(tiny_dir, DataConfig(data_workers=0)).plan(requests[0])
    size = len(prompt.token_ids)
    cache: BoundedCache[Prompt] = BoundedCache(3 * size, lambda kept: len(kept.token_ids))
    for key in range(3):
        cache.put(key, prompt)
    assert cache.get(0) is prompt
    cache.put(3, prompt)
    assert cache.get(1) is None and all(cache.get(key) is prompt for key in (0, 2, 3))
    small: BoundedCache[Prompt] = BoundedCache(size - 1, lambda kept: len(kept.token_ids))
    small.put(0, prompt)
    assert small.get(0) is None
