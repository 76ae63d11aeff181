"""Micro-batches on their way to the device, and the empty ones that keep ranks in step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dppo_mcore.data.packing import empty_batch
from dppo_mcore.types import PackedBatch


def fill_up(
    batches: Sequence[PackedBatch], multiple: int, pad_multiple: int, columns: Sequence[str]
) -> list[PackedBatch]:
    """`batches` followed by empty ones up to a positive multiple: every rank runs the schedule at least once."""
    count = max(multiple, -(-len(batches) // multiple) * multiple)
    return [*batches, *(empty_batch(pad_multiple, columns) for _ in range(count - len(batches)))]


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
