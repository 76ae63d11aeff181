"""Media of a packed row: frames dealt over the tensor-parallel ranks, and checks that features and tokens agree."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.vision import Frame
from dppo_mcore.types import PackedBatch

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class FrameShares:
    """Which frames each rank encodes, and how the gathered embeddings return to the row's order."""

    frames: tuple[tuple[int, ...], ...]
    """Frame numbers per rank, ascending."""
    sizes: tuple[Frame, ...]
    """Height and width in patches of every frame of the row."""
    unit: int
    """Patches per embedding."""

    def starts(self, in_units: bool) -> list[int]:
        """First patch (or embedding) of every frame, and the total."""
        bounds = [0]
        for h, w in self.sizes:
            bounds.append(bounds[-1] + h * w // (self.unit if in_units else 1))
        return bounds

    def rows(self, rank: int, in_units: bool) -> Tensor:
        """Rows of one rank's frames, among all patches or all embeddings."""
        bounds = self.starts(in_units)
        pieces = [torch.arange(bounds[f], bounds[f + 1]) for f in self.frames[rank]]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


@lru_cache(maxsize=64)
def share_frames(grids: tuple[Grid, ...], ranks: int, unit: int) -> FrameShares:
    """Deal the frames of these media (t, h, w) over ranks, largest first to the least loaded, by patches."""
    sizes = tuple((h, w) for t, h, w in grids for _ in range(t))
    heap = [(0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for frame in sorted(range(len(sizes)), key=lambda f: (-sizes[f][0] * sizes[f][1], f)):
        load, rank = heapq.heappop(heap)
        dealt[rank].append(frame)
        heapq.heappush(heap, (load + sizes[frame][0] * sizes[frame][1], rank))
    return FrameShares(tuple(tuple(sorted(frames)) for frames in dealt), sizes, unit)


class GatherFrames(torch.autograd.Function):
    """Each rank's embeddings [m, H] to all [M, H] in the row's order, with one all-gather.

    The language model hands every tensor-parallel rank the whole gradient of the embeddings, so the backward pass
    only picks this rank's rows; it communicates nothing. It multiplies by the number of ranks because Megatron
    averages the tower's parameter gradients over the ranks, and what is wanted is their sum.
    """

    @staticmethod
    def forward(ctx: Any, local_mH: Tensor, shares: FrameShares, group: dist.ProcessGroup) -> Tensor:  # noqa: N803
        ranks, rank = group.size(), group.rank()
        rows = [shares.rows(r, in_units=True) for r in range(ranks)]
        longest = max(len(r) for r in rows)
        padded = local_mH.new_zeros(longest, local_mH.shape[1])
        padded[: local_mH.shape[0]] = local_mH
        gathered = local_mH.new_empty(ranks * longest, local_mH.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        source = torch.empty(sum(len(r) for r in rows), dtype=torch.int64)
        for r, own in enumerate(rows):
            source[own] = torch.arange(len(own)) + r * longest
        ctx.own, ctx.ranks = rows[rank].to(local_mH.device), ranks
        return gathered.index_select(0, source.to(local_mH.device))

    @staticmethod
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_MH.index_select(0, ctx.own) * ctx.ranks, None, None


class ZeroGrad(torch.autograd.Function):
    """Passes `x` on and gives one parameter a zero gradient, so that a rank or micro-batch without frames takes part
    in gradient reductions like the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.like = (parameter.shape, parameter.dtype, parameter.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        shape, dtype, device = ctx.like
        return grad, torch.zeros((), dtype=dtype, device=device).expand(shape)


def check_media(batch: PackedBatch, qwen: QwenConfig, embeddings: int | None = None) -> None:
    """Refuse a row whose media tokens, grids, patches and positions disagree, naming the sample.

    `embeddings` is the number of media embeddings given in place of patches.
    """
    ids_L = batch.token_ids_L.cpu()
    is_media_L = (ids_L == qwen.image_token_id) | (ids_L == qwen.video_token_id)
    rows = batch.media_rows_M.cpu() if batch.media_rows_M is not None else torch.empty(0, dtype=torch.int64)
    marked_L = torch.zeros_like(is_media_L)
    marked_L[rows] = True
    lone = (is_media_L & ~marked_L).nonzero().flatten()
    if len(lone):
        raise ValueError(f"{_sample_at(batch, int(lone[0]))}: {len(lone)} media tokens have no features")
    extra = rows[~is_media_L[rows]]
    if len(extra):
        raise ValueError(f"{_sample_at(batch, int(extra[0]))}: {len(extra)} features have no media token")
    patches = sum(t * h * w for t, h, w in batch.grids)
    tokens = patches // qwen.vision.merge_unit
    if tokens != len(rows):
        what = "more features than media tokens" if tokens > len(rows) else "media tokens without features"
        raise ValueError(f"{_samples(batch)}: {what}, {tokens} against {len(rows)}")
    if embeddings is not None and embeddings != len(rows):
        raise ValueError(f"{_samples(batch)}: {embeddings} media embeddings for {len(rows)} media tokens")
    given = 0 if batch.patches_P is None else batch.patches_P.shape[0]
    if embeddings is None and given != patches:
        raise ValueError(f"{_samples(batch)}: {given} patches but grids of {patches}")


def _sample_at(batch: PackedBatch, position: int) -> str:
    """Name of the sample whose segment covers a position of the row."""
    segments_L = batch.segments_L.cpu()
    bounds = batch.cu_rows.tolist()
    loss_rows_R = batch.loss_rows_R.cpu()
    for sequence, first, end in zip(batch.sequences, bounds, bounds[1:], strict=False):
        if first < end and segments_L[loss_rows_R[first]] == segments_L[position]:
            return f"sample {sequence.sample_id}"
    return _samples(batch)


def _samples(batch: PackedBatch) -> str:
    names: Sequence[str] = list(dict.fromkeys(sequence.sample_id for sequence in batch.sequences))
    return f"sample{'s' if len(names) > 1 else ''} {', '.join(names)}"
