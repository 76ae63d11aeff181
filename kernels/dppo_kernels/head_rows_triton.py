"""Triton versions of `head_rows`: one program a row, fixed order of summation, no atomics.

Logits are fp32; their gradient is written over them in the operands' type (half the bytes), so a chunk needs no second
buffer. Nothing is specialised on a length, a temperature or a rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_kernels.backend import aligned, interpreting
from dppo_kernels.head_rows import RowStats
from dppo_kernels.vocab import VocabShard

BLOCK_V = 4096
BLOCK_C = 128
WARPS = 8
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def finite(x):
    """A shift that never makes (-inf) - (-inf)."""
    return tl.where(x == NEG_INF, 0.0, x)


@triton.jit(do_not_specialize=["columns", "start", "rows"])
def stats_kernel(
    logits_ptr, targets_ptr, stats_ptr, columns, start, rows, pitch, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    """max, sum exp(z - max), sum exp(z - max) (z - max) and the target's z of one row; stats are [4, rows]."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * pitch
    target = tl.load(targets_ptr + row) - start
    owned = (target >= 0) & (target < columns)
    target_z = tl.load(row_ptr + tl.where(owned, target, 0), mask=owned, other=float("nan")) * scale
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + column, mask=column < columns, other=float("-inf")) * scale
        new_top = tl.maximum(top, tl.max(z, 0))
        shift = finite(new_top)
        shifted = z - shift
        e = tl.exp(shifted)
        moved = finite(top) - shift
        rescale = tl.where(top == NEG_INF, 0.0, tl.exp(moved))
        if ENTROPY:
            weighted = rescale * (weighted + moved * total) + tl.sum(tl.where(e == 0.0, 0.0, e * shifted), 0)
        total = total * rescale + tl.sum(e, 0)
        top = new_top
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + rows + row, total)
    tl.store(stats_ptr + 2 * rows + row, weighted)
    tl.store(stats_ptr + 3 * rows + row, target_z)


@triton.jit(do_not_specialize=["parts", "rows"])
def union_kernel(parts_ptr, out_ptr, parts, rows, FINAL: tl.constexpr, BLOCK: tl.constexpr):
    """Union of [parts, 4, rows] statistics in order. FINAL writes max, sum, log-prob, entropy; else statistics."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    wide_rows = tl.cast(rows, tl.int64)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for part in range(0, parts):
        part_top = tl.load(parts_ptr + part * 4 * wide_rows + row, mask=inside, other=0.0)
        top = tl.where(part_top > top, part_top, tl.where(part_top != part_top, part_top, top))
    shift = finite(top)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    target_z = tl.full((BLOCK,), float("nan"), tl.float32)
    for part in range(0, parts):
        part_ptr = parts_ptr + part * 4 * wide_rows + row
        part_top = tl.load(part_ptr, mask=inside, other=0.0)
        part_total = tl.load(part_ptr + wide_rows, mask=inside, other=0.0)
        part_weighted = tl.load(part_ptr + 2 * wide_rows, mask=inside, other=0.0)
        part_target = tl.load(part_ptr + 3 * wide_rows, mask=inside, other=0.0)
        moved = finite(part_top) - shift
        rescale = tl.where(part_top == NEG_INF, 0.0, tl.exp(moved))
        total += part_total * rescale
        weighted += tl.where(rescale == 0.0, 0.0, rescale * (part_weighted + moved * part_total))
        target_z = tl.where(part_target == part_target, part_target, target_z)
    tl.store(out_ptr + row, top, mask=inside)
    tl.store(out_ptr + wide_rows + row, total, mask=inside)
    if FINAL:
        log_total = tl.log(total)
        tl.store(out_ptr + 2 * wide_rows + row, (target_z - top) - log_total, mask=inside)
        tl.store(out_ptr + 3 * wide_rows + row, log_total - weighted / total, mask=inside)
    else:
        tl.store(out_ptr + 2 * wide_rows + row, weighted, mask=inside)
        tl.store(out_ptr + 3 * wide_rows + row, target_z, mask=inside)


@triton.jit(do_not_specialize=["columns", "start"])
def grads_kernel(
    logits_ptr,
    out_ptr,
    targets_ptr,
    max_ptr,
    sum_ptr,
    entropy_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    columns,
    start,
    pitch,
    out_pitch,
    scale,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one row's logits. `out` may be the row itself in a narrower type: writes never pass the reads."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * pitch
    out_row_ptr = out_ptr + row * out_pitch
    target = tl.load(targets_ptr + row) - start
    shift = finite(tl.load(max_ptr + row))
    total = tl.load(sum_ptr + row)
    grad = tl.zeros((), tl.float32)
    slope = tl.zeros((), tl.float32)
    offset = tl.zeros((), tl.float32)
    if HAS_LOGPROB:
        grad = tl.load(grad_logprob_ptr + row) * scale
    if HAS_ENTROPY:
        slope = tl.load(grad_entropy_ptr + row) * scale
        offset = tl.load(entropy_ptr + row) - tl.log(total)
    idle = (grad == 0.0) & (slope == 0.0)
    inverse = 1.0 / total
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + column, mask=column < columns, other=float("-inf")) * scale - shift
        p = tl.exp(z) * inverse
        dz = tl.where(column == target, grad, 0.0) - p * grad
        if HAS_ENTROPY:
            dz -= tl.where(p == 0.0, 0.0, slope * p * (z + offset))
        dz = tl.where(idle, 0.0, dz)
        tl.debug_barrier()
        tl.store(out_row_ptr + column, dz.to(out_ptr.dtype.element_ty), mask=column < columns)


def block_v(columns: int) -> int:
    """Columns a program takes at a time."""
    return min(BLOCK_V, triton.next_power_of_2(max(16, columns)))


def chunk_stats(
    logits_CV: Tensor, targets_C: Tensor, shard: VocabShard, scale: float, entropy: bool, keep: bool
) -> Tensor:
    """As `head_rows.chunk_stats`; the logits stay as they are."""
    rows, columns = logits_CV.shape
    stats_4C = torch.empty(4, rows, dtype=torch.float32, device=logits_CV.device)
    if rows == 0:
        return stats_4C
    stats_kernel[(rows,)](
        logits_CV,
        aligned(targets_C),
        stats_4C,
        columns,
        shard.start,
        rows,
        logits_CV.stride(0),
        scale,
        ENTROPY=entropy,
        BLOCK=block_v(columns),
        num_warps=WARPS,
    )
    return stats_4C


def combine(gathered_W4C: Tensor) -> RowStats:
    """As `head_rows.combine`."""
    return RowStats(*_union(gathered_W4C, final=True))


def merge(parts_P4C: Tensor) -> Tensor:
    """Union of statistics as statistics, [4, C]."""
    return _union(parts_P4C, final=False)


def _union(parts_P4C: Tensor, final: bool) -> Tensor:
    parts, _, rows = parts_P4C.shape
    out_4C = torch.empty(4, rows, dtype=torch.float32, device=parts_P4C.device)
    if rows:
        grid = (triton.cdiv(rows, BLOCK_C),)
        union_kernel[grid](parts_P4C.contiguous(), out_4C, parts, rows, FINAL=final, BLOCK=BLOCK_C, num_warps=4)
    return out_4C


def chunk_grads(
    logits_PV: Tensor,
    targets_C: Tensor,
    shard: VocabShard,
    scale: float,
    stats: RowStats,
    grad_logprob_C: Tensor | None,
    grad_entropy_C: Tensor | None,
    kept_max_C: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As `head_rows.chunk_grads`; bfloat16 if that is `dtype`, else fp32.

    A float16 would lose gradients below 6e-8, as small as a mean over many tokens makes them; the interpreter's narrow
    types truncate.
    """
    rows, columns = logits_PV.shape
    narrow = dtype == torch.bfloat16 and not interpreting()
    pitch = logits_PV.stride(0)
    out_PV = torch.as_strided(logits_PV, (rows, pitch), (pitch, 1)).view(dtype) if narrow else logits_PV
    if len(stats.sum_C) == 0:
        return out_PV[:, :columns]
    sum_C = aligned(stats.sum_C)
    grads_kernel[(len(sum_C),)](
        logits_PV,
        out_PV,
        aligned(targets_C),
        aligned(stats.max_C),
        sum_C,
        aligned(stats.entropy_C),
        sum_C if grad_logprob_C is None else aligned(grad_logprob_C),
        sum_C if grad_entropy_C is None else aligned(grad_entropy_C),
        columns,
        shard.start,
        pitch,
        out_PV.stride(0),
        scale,
        HAS_LOGPROB=grad_logprob_C is not None,
        HAS_ENTROPY=grad_entropy_C is not None,
        BLOCK=block_v(columns),
        num_warps=WARPS,
    )
    return out_PV[:, :columns]
