"""Micro-batches on their way to the device, and the empty ones that keep ranks in step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dppo_mcore.types import PackedBatch


def empty_batch(tokens: int, columns: Sequence[str] = ()) -> PackedBatch:
    """A micro-batch of `tokens` padding tokens without loss rows: it changes no loss and no gradient."""
    integers = torch.zeros(tokens, dtype=torch.int64)
    return PackedBatch(
        token_ids_L=integers,
        position_ids_3L=torch.zeros(3, tokens, dtype=torch.int64),
        segments_L=torch.full((tokens,), -1, dtype=torch.int32),
        branches_L=torch.zeros(tokens, dtype=torch.int32),
        loss_rows_R=integers[:0],
        targets_R=integers[:0],
        cu_rows=torch.zeros(1, dtype=torch.int32),
        sequences=(),
        columns={name: torch.zeros(0) for name in columns},
    )


def fill_up(batches: Sequence[PackedBatch], multiple: int, tokens: int, columns: Sequence[str]) -> list[PackedBatch]:
    """`batches` followed by empty ones up to a positive multiple: every rank runs the schedule at least once."""
    count = max(multiple, -(-len(batches) // multiple) * multiple)
    return [*batches, *(empty_batch(tokens, columns) for _ in range(count - len(batches)))]


def to_device(batch: PackedBatch, device: torch.device, media: bool) -> PackedBatch:
    """The micro-batch on `device`; patches travel only where the vision tower is (`media`)."""
    if batch.token_ids_L.device == device:
        return batch

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return replace(
        batch,
        token_ids_L=move(batch.token_ids_L),
        position_ids_3L=move(batch.position_ids_3L),
        segments_L=move(batch.segments_L),
        branches_L=move(batch.branches_L),
        loss_rows_R=move(batch.loss_rows_R),
        targets_R=move(batch.targets_R),
        cu_rows=move(batch.cu_rows),
        patches_P=move(batch.patches_P) if media else None,
        media_rows_M=move(batch.media_rows_M),
        columns={name: move(column) for name, column in batch.columns.items()},
    )
