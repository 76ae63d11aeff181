"""The decoding process: reads requests from its standard input, answers with prompts and their pixels.

    python -m dppo_mcore.data.worker        (started by `ahead`, never by hand)

It ends when its input does, so a killed trainer leaves none behind.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import IO

import torch
from torch import Tensor

from dppo_mcore.data.errors import DataError, LengthError
from dppo_mcore.data.messages import Answer, Request, Setup, Task, read_message, write_message
from dppo_mcore.data.qwen import Processor
from dppo_mcore.types import Prompt


def plan_request(processor: Processor, request: Request) -> Prompt:
    """The prompt of a request, nothing decoded; `LengthError` for one beyond its limit."""
    if request.answer is None:
        prompt = processor.plan(request.sample, request.horizon)
        length = len(prompt.token_ids)
        if request.limit is not None and length > request.limit:
            raise LengthError(
                f"{length} prompt tokens, above max_prompt_tokens {request.limit}; take fewer frames or pixels"
            )
        return prompt
    return processor.plan_conversation(request.sample, request.answer, request.horizon)


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    torch.set_num_threads(1)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, sink)


if __name__ == "__main__":
    main()
