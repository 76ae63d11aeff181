"""Packed micro-batches made by hand: shared or repeated prompts, uneven lengths, text and video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.rope import mrope_positions
from dppo_mcore.types import PackedBatch, SequenceRef


@dataclass(frozen=True)
class Answer:
    """One answer with its columns (a float per token)."""

    token_ids: list[int]
    columns: dict[str, list[float]]


@dataclass(frozen=True)
class Question:
    """A prompt with at most one medium, and its answers."""

    name: str
    token_ids: list[int]
    grid: tuple[int, int, int] | None
    patches: torch.Tensor | None
    answers: list[Answer]


def random_questions(
    qwen: QwenConfig, count: int, group: int, seed: int = 0, columns: Sequence[str] = ("advantages",), longest: int = 24
) -> list[Question]:
    """Questions of very uneven length; every second one has a clip."""
    random = np.random.default_rng(seed)
    questions = []
    for number in range(count):
        ids = random.integers(20, 590, random.integers(2, 12)).tolist()
        grid = patches = None
        if number % 2:
            grid = (int(random.integers(1, 4)), 4, int(2 * random.integers(1, 4)))
            tokens = grid[0] * grid[1] * grid[2] // qwen.vision.merge_unit
            patches = torch.from_numpy(
                random.standard_normal((grid[0] * grid[1] * grid[2], qwen.vision.patch_values))
            ).float()
            ids += [qwen.vision_start_token_id, *[qwen.video_token_id] * tokens, qwen.vision_end_token_id]
            ids += random.integers(20, 590, random.integers(1, 6)).tolist()
        answers = []
        for _ in range(group):
            length = int(random.integers(1, longest + 1))
            values = {
                name: (0.5 * random.standard_normal(length) - (5.0 if "logprobs" in name else 0.0)).tolist()
                for name in columns
            }
            if "advantages" in values:
                values["advantages"] = [float(random.standard_normal())] * length
            answers.append(Answer(random.integers(20, 590, length).tolist(), values))
        questions.append(Question(f"q{number}", ids, grid, patches, answers))
    return questions


def pack(questions: Sequence[Question], qwen: QwenConfig, share: bool = True, multiple: int = 1) -> PackedBatch:
    """One micro-batch of these questions with all their answers."""
    ids: list[int] = []
    positions, segments, branches, rows, targets, lengths = [], [], [], [], [], []
    patches, grids, media_rows, keys, refs = [], [], [], [], []
    columns: dict[str, list[float]] = {}
    segment = 0

    def add_prompt(question: Question) -> tuple[int, int]:
        start = len(ids)
        grid = [] if question.grid is None else [question.grid]
        place = mrope_positions(question.token_ids, grid, [0.5] * len(grid), qwen)
        if grid:
            assert question.patches is not None
            patches.append(question.patches)
            grids.append(question.grid)
            media_rows.extend(start + i for i, token in enumerate(question.token_ids) if token == qwen.video_token_id)
            keys.append(question.name)
        ids.extend(question.token_ids)
        positions.append(place)
        segments.extend([segment] * len(question.token_ids))
        branches.extend([0] * len(question.token_ids))
        return len(ids) - 1, int(place.max()) + 1

    for question in questions:
        if share:
            last, following = add_prompt(question)
        for number, answer in enumerate(question.answers):
            if not share:
                last, following = add_prompt(question)
            start = len(ids)
            fed = answer.token_ids[:-1]
            ids.extend(fed)
            positions.append((following + torch.arange(len(fed))).expand(3, -1))
            segments.extend([segment] * len(fed))
            branches.extend([number + 1 if share else 0] * len(fed))
            rows.extend([last, *range(start, start + len(fed))])
            targets.extend(answer.token_ids)
            lengths.append(len(answer.token_ids))
            refs.append(SequenceRef(question.name, number, "video" if question.grid else "text"))
            for name, values in answer.columns.items():
                columns.setdefault(name, []).extend(values)
            if not share:
                segment += 1
        if share:
            segment += 1
    padding = -len(ids) % multiple
    return PackedBatch(
        token_ids_L=torch.tensor(ids + [0] * padding),
        position_ids_3L=torch.cat([*positions, torch.zeros(3, padding, dtype=torch.int64)], dim=1),
        segments_L=torch.tensor(segments + [-1] * padding, dtype=torch.int32),
        branches_L=torch.tensor(branches + [0] * padding, dtype=torch.int32),
        loss_rows_R=torch.tensor(rows),
        targets_R=torch.tensor(targets),
        cu_rows=torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32),
        sequences=tuple(refs),
        patches_P=torch.cat(patches) if patches else None,
        grids=tuple(grids),
        media_rows_M=torch.tensor(media_rows) if media_rows else None,
        media_keys=tuple(keys),
        columns={name: torch.tensor(values) for name, values in columns.items()},
    )
