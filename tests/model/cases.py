"""Random rows for model tests: conversations with images and clips of several rates, and groups with shared prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.rope import mrope_positions
from dppo_mcore.types import PackedBatch, SequenceRef


@dataclass(frozen=True)
class Conversation:
    """A prompt with media and its answers, as plain tensors."""

    name: str
    prompt: list[int]
    answers: list[list[int]]
    grids: tuple[tuple[int, int, int], ...]
    seconds: tuple[float | None, ...]
    patches_P: Tensor | None

    def alone(self, answer: int) -> Conversation:
        """The same with only one of the answers."""
        return replace(self, answers=[self.answers[answer]], name=f"{self.name}/{answer}")


def conversation(
    qwen: QwenConfig,
    name: str,
    seed: int,
    media: Sequence[tuple[tuple[int, int, int], float | None]] = (),
    answers: Sequence[int] = (9,),
    text: int = 6,
) -> Conversation:
    """Random text around media given as (grid, seconds per grid or None for an image)."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(0, 256, (count,), generator=generator).tolist()

    prompt = words(text)
    for grid, seconds in media:
        pad = qwen.image_token_id if seconds is None else qwen.video_token_id
        count = grid[0] * grid[1] * grid[2] // qwen.vision.merge_unit
        prompt += [qwen.vision_start_token_id, *[pad] * count, qwen.vision_end_token_id, *words(3)]
    patches = sum(t * h * w for (t, h, w), _ in media)
    return Conversation(
        name=name,
        prompt=prompt,
        answers=[words(count) for count in answers],
        grids=tuple(grid for grid, _ in media),
        seconds=tuple(seconds for _, seconds in media),
        patches_P=torch.randn(patches, qwen.vision.patch_values, generator=generator) if patches else None,
    )


def mixed_conversations(qwen: QwenConfig) -> list[Conversation]:
    """Text, an image, a clip at 2 fps, another rate beside an image, two clips: every kind of row there is."""
    image, wide, clip, slow, fast = (1, 4, 6), (1, 6, 10), (3, 4, 4), (2, 6, 4), (4, 4, 6)
    return [
        conversation(qwen, "image", 1, [(image, None)], [9]),
        conversation(qwen, "clip", 2, [(clip, 1.0)], [5]),
        conversation(qwen, "text", 3, [], [12], text=17),
        conversation(qwen, "mixed", 4, [(wide, None), (slow, 0.4)], [7]),
        conversation(qwen, "clips", 5, [(slow, 3.7), (fast, 0.25)], [11]),
        conversation(qwen, "plain", 6, [], [8]),
    ]


def pack(conversations: Sequence[Conversation], qwen: QwenConfig, pad_multiple: int = 4) -> PackedBatch:
    """One packed row; a conversation with several answers shares its prompt between them.

    Loss rows are the answers' tokens; the column `weights` holds a random number for each.
    """
    ids: list[int] = []
    positions: list[Tensor] = []
    segments: list[int] = []
    branches: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    cu_rows = [0]
    sequences: list[SequenceRef] = []
    weights: list[Tensor] = []
    for segment, item in enumerate(conversations):
        start = len(ids)
        prompt_3L = mrope_positions(item.prompt, item.grids, item.seconds, qwen, item.name)
        after = int(prompt_3L.max()) + 1
        ids += item.prompt
        positions.append(prompt_3L)
        segments += [segment] * len(item.prompt)
        branches += [0] * len(item.prompt)
        for index, answer in enumerate(item.answers):
            rows += [start + len(item.prompt) - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            targets += answer
            cu_rows.append(len(rows))
            sequences.append(SequenceRef(item.name, index))
            weights.append(answer_weights(answer))
            ids += answer
            positions.append(torch.arange(after, after + len(answer)).expand(3, -1))
            segments += [segment] * len(answer)
            branches += [index + 1] * len(answer)
    padding = -len(ids) % pad_multiple
    ids += [0] * padding
    positions.append(torch.zeros(3, padding, dtype=torch.int64))
    segments += [-1] * padding
    branches += [0] * padding
    ids_L = torch.tensor(ids)
    is_media_L = (ids_L == qwen.image_token_id) | (ids_L == qwen.video_token_id)
    patches = [item.patches_P for item in conversations if item.patches_P is not None]
    return PackedBatch(
        token_ids_L=ids_L,
        position_ids_3L=torch.cat(positions, dim=1),
        segments_L=torch.tensor(segments, dtype=torch.int32),
        branches_L=torch.tensor(branches, dtype=torch.int32),
        loss_rows_R=torch.tensor(rows),
        targets_R=torch.tensor(targets),
        cu_rows=torch.tensor(cu_rows, dtype=torch.int32),
        sequences=tuple(sequences),
        patches_P=torch.cat(patches) if patches else None,
        grids=tuple(grid for item in conversations for grid in item.grids),
        media_rows_M=is_media_L.nonzero().flatten() if patches else None,
        columns={"weights": torch.cat(weights)},
    )


def answer_weights(answer: Sequence[int]) -> Tensor:
    """A weight per token that depends on the tokens alone, so that it is the same in every packing."""
    generator = torch.Generator().manual_seed(sum(answer))
    return torch.randn(len(answer), generator=generator)
