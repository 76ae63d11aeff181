"""What a decoding process and its owner say to each other.

A message is a length and a pickle; an answer is followed by each medium's uint8 patches as raw bytes.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Hashable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from dppo_mcore.config import DataConfig
from dppo_mcore.data.errors import DataError
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
    limit: int | None = None
    """A prompt of more tokens is refused before anything is decoded; conversations are cut instead."""

    @property
    def key(self) -> Hashable:
        """Equal for equal work; two manifests may use one id for different samples."""
        return (self.sample.id, self.sample.turns, self.sample.media, self.horizon, self.answer, self.limit)

    @property
    def use(self) -> str:
        """What a refusal for its length holds for."""
        return use_of(self.horizon, self.answer is not None)


def use_of(horizon: float | None, learnt: bool) -> str:
    """Requests of one use are equally long: prompts or conversations (`learnt`) of one horizon."""
    return ("conversation" if learnt else "prompt") + ("" if horizon is None else f" of {horizon:g} s")


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
