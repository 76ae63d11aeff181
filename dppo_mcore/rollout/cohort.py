"""Answers being made by the embedded engine, and the cohorts in which they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dppo_mcore.rollout.answers import RawAnswer
from dppo_mcore.rollout.base import GenerationRequest, Prefix
from dppo_mcore.rollout.kv_cache import CohortCache

GHOST_SHARE = 8
"""Finished answers stay in the batch until they are one in so many, then all leave together."""


@dataclass(slots=True)
class Answer:
    """One answer being made."""

    request: GenerationRequest
    index: int
    tokens: list[int] = field(default_factory=list)
    """New tokens, the carried-over prefix not included."""
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(weight version, first token sampled under it)."""
    finish: Literal["stop", "length", "abort"] | None = None

    @property
    def prefix(self) -> Prefix:
        """What it was carried on from."""
        return self.request.prefixes.get(self.index, Prefix((), (), ()))

    def raw(self) -> RawAnswer:
        """As an engine's answer."""
        starts = [*(start for _, start in self.versions), len(self.tokens)]
        versions = tuple((version, start, starts[n + 1]) for n, (version, start) in enumerate(self.versions))
        return RawAnswer(tuple(self.tokens), tuple(self.logprobs), self.finish or "abort", versions)


@dataclass
class Cohort:
    """Answers prefilled together: host records and the device tensors of their next step."""

    answers: list[Answer]
    cache: CohortCache
    tokens_B: Tensor
    """Last token of each answer, not yet run through the model."""
    seeds_B: Tensor
    steps_B: Tensor
    """Tokens each answer has, prefix included."""
    positions_B: Tensor
    """Rotary position of the last token."""

    def keep(self, rows: list[int]) -> None:
        """Drop all answers but these."""
        self.cache.keep(rows)
        index = torch.tensor(rows, device=self.tokens_B.device)
        self.answers = [self.answers[row] for row in rows]
        self.tokens_B, self.seeds_B = self.tokens_B[index], self.seeds_B[index]
        self.steps_B, self.positions_B = self.steps_B[index], self.positions_B[index]

    def without_finished(self) -> bool:
        """Drop finished answers once they are worth the copy; whether any answer is left running."""
        rows = [row for row, answer in enumerate(self.answers) if answer.finish is None]
        if rows and (len(self.answers) - len(rows)) * GHOST_SHARE >= len(self.answers) > len(rows):
            self.keep(rows)
        return bool(rows)
