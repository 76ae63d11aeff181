"""Prompts and answers to packed rows (`PackedBatch`).

A group is laid out as prompt, answer 0, answer 1, ...; each answer's positions continue the prompt's, and the last
prompt token predicts the first token of every answer.
Shape suffixes: L tokens, R loss rows, N tokens of one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dppo_mcore.data.balance import balance
from dppo_mcore.data.errors import DataError
from dppo_mcore.data.frames import plan_key
from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.rope import mrope_positions
from dppo_mcore.types import PackedBatch, Prompt, SequenceRef

Column = float | Sequence[float] | Tensor
PAD_TOKEN = 0


@dataclass(frozen=True, slots=True)
class _Unit:
    """What stays together in a row: a prompt with some answers (numbers), or a conversation."""

    prompt: int
    answers: tuple[int, ...]
    tokens: int
    cost: float


def pack_groups(
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Sequence[int]]],
    columns: Mapping[str, Sequence[Sequence[Column]]] | None,
    qwen: QwenConfig,
    max_tokens: int,
    share: bool = True,
    pad_multiple: int = 1,
    *,
    indices: Sequence[Sequence[int]] | None = None,
    max_groups: int | None = None,
) -> list[PackedBatch]:
    """Pack RL groups. `answers[p][g]` are the token ids of answer g to prompt p, ending as they were sampled.

    `columns[name][p][g]` is a number for the whole answer or one per token. With `share` a prompt is laid out once
    for its answers; a group beyond `max_tokens` is split over rows, its prompt repeated. A single answer that is
    still too long gets a row of its own. `indices` are the answers' numbers within their groups where some are left
    out. `max_groups` bounds the prompts of a row.
    """
    units = []
    for number, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        if any(not answer for answer in group):
            raise DataError(f"sample {prompt.sample.id}: an answer without tokens cannot be packed")
        units += _group_units(number, prompt, [len(answer) for answer in group], qwen, max_tokens, share)
    rows = _fill(units, max_tokens, max_groups)
    positions = [_positions(prompt, qwen) for prompt in prompts]
    packed = []
    for row in rows:
        builder = _Row()
        for unit in row:
            prompt, group = prompts[unit.prompt], answers[unit.prompt]
            builder.start(prompt, positions[unit.prompt], qwen)
            for branch, g in enumerate(unit.answers, 1):
                values = {name: column[unit.prompt][g] for name, column in (columns or {}).items()}
                index = g if indices is None else indices[unit.prompt][g]
                builder.answer(group[g], branch, SequenceRef(prompt.sample.id, index, prompt.sample.source), values)
        packed.append(builder.finish(pad_multiple, tuple(columns or ())))
    return packed


def pack_conversations(
    prompts: Sequence[Prompt],
    qwen: QwenConfig,
    max_tokens: int,
    pad_multiple: int = 1,
    columns: Mapping[str, Sequence[Column]] | None = None,
    *,
    max_groups: int | None = None,
) -> list[PackedBatch]:
    """Pack conversations with loss masks, one segment each; every learnt token has a row at the token before it.

    `columns[name][p]` is a number for the whole conversation or one per token of it.
    """
    units = []
    for number, prompt in enumerate(prompts):
        if prompt.loss_mask is None or not any(prompt.loss_mask[1:]):
            raise DataError(f"sample {prompt.sample.id}: has no token to learn; make it with Processor.conversation")
        units.append(_Unit(number, (), len(prompt.token_ids), sequence_cost(prompt, len(prompt.token_ids), qwen)))
    packed = []
    for row in _fill(units, max_tokens, max_groups):
        builder = _Row()
        for unit in row:
            prompt = prompts[unit.prompt]
            builder.start(prompt, _positions(prompt, qwen), qwen)
            builder.conversation(prompt, {name: column[unit.prompt] for name, column in (columns or {}).items()})
        packed.append(builder.finish(pad_multiple, tuple(columns or ())))
    return packed


def empty_batch(pad_multiple: int = 1, columns: Sequence[str] = ()) -> PackedBatch:
    """A row of padding without loss rows, for a rank that has fewer micro-batches than the others."""
    return _Row().finish(pad_multiple, columns)


def sequence_cost(prompt: Prompt, tokens: int, qwen: QwenConfig, attended: float | None = None) -> float:
    """Forward FLOPs of `tokens` tokens with the prompt's media; `attended` is the number of (query, key) pairs."""
    layer = qwen.hidden_size * (2 * qwen.num_heads + 2 * qwen.num_kv_heads) * qwen.head_dim
    layer += 3 * qwen.hidden_size * qwen.intermediate_size
    pairs = tokens * (tokens + 1) / 2 if attended is None else attended
    language = qwen.num_layers * (2 * layer * tokens + 4 * qwen.num_heads * qwen.head_dim * pairs)
    return language + sum(vision_cost(media.plan.grid, qwen) for media in prompt.media)


def vision_cost(grid: tuple[int, int, int], qwen: QwenConfig) -> float:
    """Forward FLOPs of the vision tower and merger for one medium."""
    vision = qwen.vision
    t, h, w = grid
    patches = t * h * w
    width = vision.hidden_size
    window = (vision.window_size // vision.patch_size) ** 2
    full = len(vision.full_attention_blocks)
    linear = 2 * patches * (4 * width * width + 3 * width * vision.intermediate_size)
    attention = 4 * width * patches
    merged = width * vision.merge_unit
    return (
        vision.depth * linear
        + full * attention * h * w
        + (vision.depth - full) * attention * min(window, h * w)
        + 2 * patches * vision.patch_values * width
        + 2 * (patches // vision.merge_unit) * merged * (merged + vision.out_hidden_size)
    )


def _group_units(
    number: int, prompt: Prompt, lengths: Sequence[int], qwen: QwenConfig, max_tokens: int, share: bool
) -> list[_Unit]:
    size = len(prompt.token_ids)
    units: list[_Unit] = []
    chosen: list[int] = []
    tokens = size

    def close() -> None:
        own = [lengths[g] for g in chosen]
        pairs = size * (size + 1) / 2 + sum(length * size + length * (length + 1) / 2 for length in own)
        units.append(_Unit(number, tuple(chosen), tokens, sequence_cost(prompt, tokens, qwen, pairs)))

    for g, length in enumerate(lengths):
        if chosen and (not share or tokens + length > max_tokens):
            close()
            chosen, tokens = [], size
        chosen.append(g)
        tokens += length
    if chosen:
        close()
    return units


def _fill(units: list[_Unit], max_tokens: int, max_groups: int | None) -> list[list[_Unit]]:
    """Rows within the token budget: first fit by falling length, then evened out by cost over as many rows."""
    rows: list[list[_Unit]] = []
    room: list[int] = []
    for unit in sorted(units, key=lambda unit: (-unit.tokens, unit.prompt)):
        fits = (
            at
            for at, free in enumerate(room)
            if unit.tokens <= free and _prompts([*rows[at], unit]) <= (max_groups or len(units))
        )
        at = next(fits, None)
        if at is None:
            rows.append([])
            room.append(max_tokens)
            at = len(rows) - 1
        rows[at].append(unit)
        room[at] -= unit.tokens
    parts = balance([unit.cost for unit in units], max(len(rows), 1))
    even = [[units[number] for number in part] for part in parts]
    if units and all(_allowed(row, max_tokens, max_groups) for row in even):
        rows = even
    return [sorted(row, key=lambda unit: (unit.prompt, unit.answers)) for row in rows]


def _allowed(row: list[_Unit], max_tokens: int, max_groups: int | None) -> bool:
    fits = len(row) <= 1 or sum(unit.tokens for unit in row) <= max_tokens
    return fits and (max_groups is None or _prompts(row) <= max_groups)


def _prompts(row: list[_Unit]) -> int:
    return len({unit.prompt for unit in row})


def _positions(prompt: Prompt, qwen: QwenConfig) -> Tensor:
    grids = [media.plan.grid for media in prompt.media]
    seconds = [media.plan.seconds_per_grid for media in prompt.media]
    return mrope_positions(prompt.token_ids, grids, seconds, qwen, name=prompt.sample.id)


class _Row:
    """Collects one packed row as numpy pieces."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[np.ndarray] = []
        self.branches: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.columns: list[dict[str, np.ndarray]] = []
        self.sequences: list[SequenceRef] = []
        self.patches: list[Tensor] = []
        self.grids: list[tuple[int, int, int]] = []
        self.media_rows: list[np.ndarray] = []
        self.keys: list[str] = []
        self.length = 0
        self.segment = -1
        self.last = 0
        self.next_position = 0

    def start(self, prompt: Prompt, positions_3N: Tensor, qwen: QwenConfig) -> None:
        """Begin a segment with a prompt or a conversation."""
        self.segment += 1
        ids_N = np.asarray(prompt.token_ids, np.int64)
        is_media_N = (ids_N == qwen.image_token_id) | (ids_N == qwen.video_token_id)
        self.media_rows.append(np.flatnonzero(is_media_N) + self.length)
        for media in prompt.media:
            if media.patches is None:
                raise DataError(f"sample {prompt.sample.id}: {media.plan.path} is not decoded; use Processor.load")
            self.patches.append(media.patches)
            self.grids.append(media.plan.grid)
            self.keys.append(plan_key(media.plan))
        self._place(ids_N, positions_3N.numpy(), 0)
        self.last = self.length - 1
        self.next_position = int(positions_3N.max()) + 1

    def answer(self, ids: Sequence[int], branch: int, sequence: SequenceRef, values: Mapping[str, Column]) -> None:
        """Add one answer to the segment, with its loss rows."""
        ids_N = np.asarray(ids, np.int64)
        begin = self.length
        position_N = np.arange(self.next_position, self.next_position + len(ids_N))
        self._place(ids_N, np.broadcast_to(position_N, (3, len(ids_N))), branch)
        rows_N = np.arange(begin - 1, begin - 1 + len(ids_N))
        rows_N[0] = self.last
        where = f"sample {sequence.sample_id}, answer {sequence.index}"
        self._learn(
            rows_N,
            ids_N,
            sequence,
            {name: _per_token(value, len(ids_N), where, name) for name, value in values.items()},
        )

    def conversation(self, prompt: Prompt, values: Mapping[str, Column]) -> None:
        """Add the loss rows of the conversation that `start` laid out."""
        ids_N = np.asarray(prompt.token_ids, np.int64)
        learnt = np.flatnonzero(np.asarray(prompt.loss_mask)[1:]) + 1
        begin = self.length - len(ids_N)
        where = f"sample {prompt.sample.id}"
        per_token = {name: _per_token(value, len(ids_N), where, name)[learnt] for name, value in values.items()}
        sequence = SequenceRef(prompt.sample.id, 0, prompt.sample.source)
        self._learn(learnt - 1 + begin, ids_N[learnt], sequence, per_token)

    def finish(self, pad_multiple: int, column_names: Sequence[str]) -> PackedBatch:
        """The packed row, padded."""
        padding = max(-self.length % pad_multiple, 0 if self.length else pad_multiple)
        self.segment = -1
        self._place(np.full(padding, PAD_TOKEN), np.broadcast_to(np.arange(padding), (3, padding)), 0)
        lengths = [len(rows_N) for rows_N in self.rows]
        media_rows_M = np.concatenate([np.zeros(0, np.int64), *self.media_rows])
        return PackedBatch(
            token_ids_L=torch.from_numpy(np.concatenate(self.tokens)),
            position_ids_3L=torch.from_numpy(np.concatenate(self.positions, axis=1)),
            segments_L=torch.from_numpy(np.concatenate(self.segments)),
            branches_L=torch.from_numpy(np.concatenate(self.branches)),
            loss_rows_R=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *self.rows])),
            targets_R=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *self.targets])),
            cu_rows=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
            sequences=tuple(self.sequences),
            patches_P=torch.cat(self.patches) if self.patches else None,
            grids=tuple(self.grids),
            media_rows_M=torch.from_numpy(media_rows_M) if self.patches else None,
            media_keys=tuple(self.keys),
            columns={
                name: torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(row[name] for row in self.columns)]))
                for name in column_names
            },
        )

    def _place(self, ids_N: np.ndarray, positions_3N: np.ndarray, branch: int) -> None:
        self.tokens.append(ids_N.astype(np.int64, copy=False))
        self.positions.append(positions_3N.astype(np.int64, copy=False))
        self.segments.append(np.full(len(ids_N), self.segment, np.int32))
        self.branches.append(np.full(len(ids_N), branch, np.int32))
        self.length += len(ids_N)

    def _learn(
        self, rows_N: np.ndarray, targets_N: np.ndarray, sequence: SequenceRef, values: dict[str, np.ndarray]
    ) -> None:
        self.rows.append(rows_N)
        self.targets.append(targets_N)
        self.columns.append(values)
        self.sequences.append(sequence)


def _per_token(value: Column, count: int, where: str, name: str) -> np.ndarray:
    if isinstance(value, (int, float)):
        return np.full(count, value, np.float32)
    values = np.asarray(value, np.float32)
    if values.shape != (count,):
        raise DataError(f"{where}: column {name} has {values.shape} values for {count} tokens")
    return values
