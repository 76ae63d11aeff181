"""The decoding process: reads requests from its standard input, answers with prompts and their pixels.

    python -m dppo_mcore.data.worker        (started by `ahead`, never by hand)

It ends when its input does, so a killed trainer leaves none behind. A message is a length, a pickle, and for each
medium of an answer its uint8 patches as raw bytes.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import traceback
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from dppo_mcore.config import DataConfig
from dppo_mcore.data.errors import DataError
from dppo_mcore.data.qwen import Processor
from dppo_mcore.types import Prompt, Sample


@dataclass(frozen=True, slots=True)
class Setup:
    """First message to a worker."""

    model_dir: str
    data: DataConfig
    device: str


@dataclass(frozen=True, slots=True)
class Request:
    """What to make of a sample: a prompt, or a conversation where an answer is given."""

    sample: Sample
    horizon: float | None = None
    answer: str | None = None

    @property
    def key(self) -> tuple[str, float | None, str | None]:
        """Equal for equal work."""
        return (self.sample.id, self.horizon, self.answer)


@dataclass(frozen=True, slots=True)
class Task:
    """A request to a worker; `pixels` False only plans."""

    request: Request
    pixels: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """A worker's answer; `shapes` announces the raw patches that follow."""

    prompt: Prompt | None
    shapes: tuple[tuple[int, int], ...] = ()
    error: DataError | None = None
    failure: str = ""
    counts: dict[str, int] | None = None


def plan_request(processor: Processor, request: Request) -> Prompt:
    """The prompt of a request, nothing decoded."""
    if request.answer is None:
        return processor.plan(request.sample, request.horizon)
    return processor.plan_conversation(request.sample, request.answer, request.horizon)


def write_message(stream: IO[bytes], message: Any) -> None:
    """Length, then pickle."""
    content = pickle.dumps(message, protocol=5)
    stream.write(struct.pack(">Q", len(content)) + content)


def read_message(stream: IO[bytes]) -> Any:
    """Inverse of `write_message`; EOFError where the other side is gone."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    size = struct.unpack(">Q", head)[0]
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)


def read_pixels(stream: IO[bytes], shape: tuple[int, int]) -> Tensor:
    """Raw uint8 patches that follow an answer."""
    patches_PV = torch.empty(shape, dtype=torch.uint8)
    view = patches_PV.numpy().data.cast("B")
    done = 0
    while done < len(view):
        got = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        done += got
    return patches_PV


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer requests until the input ends."""
    setup: Setup = read_message(source)
    processor = Processor(setup.model_dir, setup.data, torch.device(setup.device))
    while True:
        try:
            task: Task = read_message(source)
        except EOFError:
            return
        answer, pixels = _work(processor, task)
        write_message(sink, answer)
        for patches_PV in pixels:
            sink.write(patches_PV.contiguous().numpy().data.cast("B"))
        sink.flush()


def _work(processor: Processor, task: Task) -> tuple[Answer, list[Tensor]]:
    before = dict(processor.decoder.counts)
    prompt: Prompt | None = None
    pixels: list[Tensor] = []
    error: DataError | None = None
    failure = ""
    try:
        prompt = plan_request(processor, task.request)
        if task.pixels:
            pixels = [processor.pixels(media.plan) for media in prompt.media]
    except DataError as known:
        prompt, error = None, known
    except Exception:
        prompt, failure = None, traceback.format_exc()
    counts = {name: n - before.get(name, 0) for name, n in processor.decoder.counts.items()}
    shapes = tuple((int(patches_PV.shape[0]), int(patches_PV.shape[1])) for patches_PV in pixels)
    return Answer(prompt, shapes if prompt else (), error, failure, counts), pixels if prompt else []


def main() -> None:
    """Keep the real output to ourselves: a library that prints must not break the protocol."""
    torch.set_num_threads(1)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
