"""The reference policy: a second set of weights in pinned host memory that changes places with the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dppo_mcore.runtime import device


class Reference:
    """Frozen copy of this rank's shard of the weights; those of frozen parameters are not kept twice."""

    def __init__(self, models: Sequence[nn.Module], step: int) -> None:
        self.step = step
        """Optimizer steps of the run when it was taken: its name in checkpoints."""
        self._live = [p for model in models for p in model.parameters() if p.requires_grad]
        self.weights: list[Tensor] = [device.pin(p.detach()) for p in self._live]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference weights inside this context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def reset(self, step: int) -> None:
        """Make the model's present weights the reference."""
        self.step = step
        for held, live in zip(self.weights, self._live, strict=True):
            held.copy_(live, non_blocking=True)
        device.synchronize()

    @torch.no_grad()
    def _exchange(self) -> None:
        for held, live in zip(self.weights, self._live, strict=True):
            arriving = held.to(live.device, non_blocking=True, copy=True)
            held.copy_(live, non_blocking=True)
            live.copy_(arriving)
        device.synchronize()
