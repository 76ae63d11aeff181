"""Prompts, and answers that already have tokens, as one packed row: for prefilling and for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.rollout.base import EngineError
from dppo_mcore.rollout.media import positions
from dppo_mcore.types import PackedBatch, Prompt, SequenceRef

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PackedPrompts:
    """A packed row and where its parts lie. Answers are numbered over all prompts, in order."""

    batch: PackedBatch
    prompts: list[Span]
    answers: list[Span]
    prompt_of_answer: list[int]
    next_positions: list[int]
    """Rotary position after the last token of each answer (or of its prompt, if it has none)."""


def pack_prompts(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Sequence[int]]],
    qwen: QwenConfig,
    multiple: int,
    *,
    every_token: bool = False,
) -> PackedPrompts:
    """Pack each prompt with its answers' tokens so far (empty ones take no room); the length is padded to `multiple`.

    Loss rows: the position from which each answer's next token is predicted; with `every_token`, the positions that
    predict the tokens the answers hold, with those as targets.
    """
    ids: list[int] = []
    segments: list[int] = []
    branches: list[int] = []
    pieces_3L: list[Tensor] = []
    prompt_spans: list[Span] = []
    answer_spans: list[Span] = []
    owners: list[int] = []
    following: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    references: list[SequenceRef] = []

    def add(tokens: Sequence[int], positions_3L: Tensor, segment: int, branch: int) -> Span:
        start = len(ids)
        ids.extend(tokens)
        segments.extend([segment] * len(tokens))
        branches.extend([branch] * len(tokens))
        pieces_3L.append(positions_3L)
        return start, len(ids)

    for segment, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        positions_3L = positions(prompt, qwen)
        span = add(prompt.token_ids, positions_3L, segment, 0)
        prompt_spans.append(span)
        start = int(positions_3L.max()) + 1
        for branch, tokens in enumerate(group, 1):
            own_1L = torch.arange(start, start + len(tokens))
            answer = add(tokens, own_1L.expand(3, -1), segment, branch)
            answer_spans.append(answer)
            owners.append(segment)
            following.append(start + len(tokens))
            references.append(SequenceRef(prompt.sample.id, branch - 1))
            steps = [span[1] - 1, *range(*answer)]
            rows.extend(steps[:-1] if every_token else steps[-1:])
            targets.extend(tokens if every_token else [-1])
            counts.append(len(tokens) if every_token else 1)
    padding = -len(ids) % multiple
    add([0] * padding, torch.zeros(3, padding, dtype=torch.int64), -1, 0)
    media = [item for prompt in prompts for item in prompt.media]
    token_ids_L = torch.tensor(ids)
    batch = PackedBatch(
        token_ids_L=token_ids_L,
        position_ids_3L=torch.cat(pieces_3L, dim=1),
        segments_L=torch.tensor(segments, dtype=torch.int32),
        branches_L=torch.tensor(branches, dtype=torch.int32),
        loss_rows_R=torch.tensor(rows, dtype=torch.int64),
        targets_R=torch.tensor(targets, dtype=torch.int64),
        cu_rows=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        sequences=tuple(references),
        patches_P=torch.cat([item.patches for item in media if item.patches is not None]) if media else None,
        grids=tuple(item.plan.grid for item in media),
        media_rows_M=_media_rows(token_ids_L, segments, branches, qwen) if media else None,
    )
    return PackedPrompts(batch, prompt_spans, answer_spans, owners, following)


def check_decoded(prompt: Prompt) -> None:
    """Refuse a prompt whose media were planned but never decoded."""
    for item in prompt.media:
        if item.patches is None:
            raise EngineError(
                f"sample {prompt.sample.id}: {item.plan.path} is not decoded; the engine needs its patches"
            )


def _media_rows(token_ids_L: Tensor, segments: list[int], branches: list[int], qwen: QwenConfig) -> Tensor:
    in_prompt = (torch.tensor(segments) >= 0) & (torch.tensor(branches) == 0)
    is_media = (token_ids_L == qwen.image_token_id) | (token_ids_L == qwen.video_token_id)
    return (is_media & in_prompt).nonzero().flatten()
