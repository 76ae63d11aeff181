"""One call from a frame plan to pixels, whatever decodes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dppo_mcore.data.decode_pyav import PyAvDecoder
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.images import read_image
from dppo_mcore.data.patches import resize
from dppo_mcore.types import FramePlan

# Who is asked, in order, by option and device. PyAV decodes whatever DALI can on a CPU, so nobody comes after it.
CHAINS = {
    ("auto", "cuda"): ("dali", "pyav"),
    ("dali", "cuda"): ("dali", "pyav"),
    ("dali", "cpu"): ("dali", "pyav"),
}


class Backend(Protocol):
    """A video decoder."""

    name: str

    def decode(self, path: str, indices: tuple[int, ...], size: tuple[int, int], rotation: int = 0) -> Tensor:
        """Frames by number in presentation order: uint8 [T, 3, h, w]."""
        ...


class Decoder:
    """Asks its backends in turn. `counts` tells clips per backend and refusals, for the metrics."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.backends = tuple(backends)
        self.counts: Counter[str] = Counter()

    def __call__(self, plan: FramePlan) -> Tensor:
        """The planned frames, uint8 [T, 3, h, w]; raises the last backend's `MediaError` when all refuse."""
        if plan.kind == "image":
            self.counts["decode/images"] += 1
            return decode_image(plan)
        refusal: MediaError | None = None
        for backend in self.backends:
            try:
                frames_TCHW = backend.decode(plan.path, plan.indices, plan.size, plan.rotation)
            except MediaError as error:
                self.counts[f"decode/{backend.name}_refused"] += 1
                refusal = error
            else:
                self.counts[f"decode/{backend.name}"] += 1
                return frames_TCHW
        assert refusal is not None
        raise refusal


def make_decoder(name: str, device: torch.device) -> Decoder:
    """Decoder of the option `decoder` on a device."""
    return Decoder([_backend(each, device) for each in CHAINS.get((name, device.type), ("pyav",))])


def _backend(name: str, device: torch.device) -> Backend:
    if name == "pyav":
        return PyAvDecoder()
    from dppo_mcore.data.decode_dali import DaliDecoder

    return DaliDecoder(device)


def decode_image(plan: FramePlan) -> Tensor:
    """An image, turned as its EXIF says, as one frame uint8 [1, 3, h, w]."""
    return resize(read_image(plan.path), plan.size)
