"""Forward-only log-probs in one Triton kernel: logits live in registers and never reach memory.

A program owns 128 rows and one split of the vocabulary and walks over its tiles with running statistics. Tiles and
splits depend on nothing but the weight's shape, so a row's value does not depend on any other row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dppo_kernels.backend import interpreting
from dppo_kernels.head import Head
from dppo_kernels.head_rows import RowStats
from dppo_kernels.head_rows_triton import NEG_INF, combine, finite, merge

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
WIDE_TILE = 64, 64, 32
"""For fp32 operands, which no tensor core multiplies exactly."""
WARPS, STAGES = 8, 4
SPLITS = 8
GROUP = 16
"""Row blocks that walk the vocabulary together: their hidden states stay in L2."""


@triton.jit(do_not_specialize=["rows", "columns", "start", "split_columns", "row_blocks"])
def fused_kernel(
    hidden_desc, weight_desc, targets_ptr, stats_ptr, rows, columns, start, split_columns, row_blocks, scale,
    WIDTH: tl.constexpr, ENTROPY: tl.constexpr, UPCAST: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Statistics [SPLITS, 4, rows] as `stats_kernel` has them, each over its split of the columns."""
    pid = tl.program_id(0)
    group_size = GROUP * SPLITS
    first_block = pid // group_size * GROUP
    blocks = tl.minimum(row_blocks - first_block, GROUP)
    row_block = first_block + pid % group_size % blocks
    split = pid % group_size // blocks
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    target = tl.load(targets_ptr + row, mask=inside, other=-1) - start
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    target_z = tl.full((BLOCK_M,), float("nan"), tl.float32)
    split_end = tl.minimum((split + 1) * split_columns, columns)
    for first in range(split * split_columns, split_end, BLOCK_N):
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            hidden = hidden_desc.load([row_block * BLOCK_M, k])
            weight = weight_desc.load([first, k])
            if UPCAST:
                hidden = hidden.to(tl.float32)
                weight = weight.to(tl.float32)
            z = tl.dot(hidden, weight.T, z, input_precision="ieee")
        column = first + tl.arange(0, BLOCK_N)
        z = tl.where((column < split_end)[None, :], z * scale, float("-inf"))
        hit = (column[None, :] == target[:, None]) & (column < split_end)[None, :]
        found = (target >= first) & (target < first + BLOCK_N) & (target < split_end)
        target_z = tl.where(found, tl.sum(tl.where(hit, z, 0.0), 1), target_z)
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = finite(new_top)
        e = tl.exp(z - shift[:, None])
        moved = finite(top) - shift
        rescale = tl.where(top == NEG_INF, 0.0, tl.exp(moved))
        if ENTROPY:
            own = tl.sum(tl.where(e == 0.0, 0.0, e * (z - shift[:, None])), 1)
            weighted = rescale * (weighted + moved * total) + own
        total = total * rescale + tl.sum(e, 1)
        top = new_top
    at = stats_ptr + tl.cast(split, tl.int64) * 4 * rows + row
    tl.store(at, top, mask=inside)
    tl.store(at + rows, total, mask=inside)
    tl.store(at + 2 * rows, weighted, mask=inside)
    tl.store(at + 3 * rows, target_z, mask=inside)


def fused_stats(head: Head, entropy: bool) -> RowStats:
    """Statistics of all valid rows, [n] each. Only masked rows cost memory: the others are gathered beside them."""
    hidden_nH = head.hidden_NH if head.rows_n is None else head.hidden_NH.index_select(0, head.rows_n)
    if hidden_nH.shape[1] * hidden_nH.dtype.itemsize % 16:
        raise ValueError(f"hidden size {hidden_nH.shape[1]}: backend 'triton_fused' needs rows of whole 16 bytes")
    rows, columns = hidden_nH.shape[0], head.weight_VH.shape[0]
    stats_S4n = torch.empty(SPLITS, 4, rows, dtype=torch.float32, device=hidden_nH.device)
    if rows == 0 or columns == 0:
        stats_S4n.zero_()
        stats_S4n[:, 0] = float("-inf")
        stats_S4n[:, 3] = float("nan")
    else:
        _launch(hidden_nH.contiguous(), head, stats_S4n, entropy)
    return combine(head.shard.gather(merge(stats_S4n)))


def _launch(hidden_nH: Tensor, head: Head, stats_S4n: Tensor, entropy: bool) -> None:
    weight_VH = head.weight_VH.contiguous()
    rows, columns = hidden_nH.shape[0], weight_VH.shape[0]
    block_m, block_n, block_k = (BLOCK_M, BLOCK_N, BLOCK_K) if hidden_nH.dtype.itemsize == 2 else WIDE_TILE
    row_blocks = triton.cdiv(rows, block_m)
    split_columns = triton.cdiv(triton.cdiv(columns, block_n), SPLITS) * block_n
    fused_kernel[(row_blocks * SPLITS,)](
        TensorDescriptor.from_tensor(hidden_nH, [block_m, block_k]),
        TensorDescriptor.from_tensor(weight_VH, [block_n, block_k]),
        head.targets_n,
        stats_S4n,
        rows,
        columns,
        head.shard.start,
        split_columns,
        row_blocks,
        head.scale,
        WIDTH=hidden_nH.shape[1],
        ENTROPY=entropy,
        UPCAST=interpreting(),
        SPLITS=SPLITS,
        GROUP=GROUP,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=WARPS,
        num_stages=STAGES,
    )
