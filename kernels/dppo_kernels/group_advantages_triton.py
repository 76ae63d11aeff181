"""Triton version of the advantages: one launch, any order. A program compares its rewards' ids with all ids."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_kernels.backend import aligned, on_device_of

BLOCK_B = 16
BLOCK_J = 128


@triton.jit(do_not_specialize=["count"])
def advantages_kernel(
    rewards_ptr,
    ids_ptr,
    out_ptr,
    count,
    eps,
    SCALE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Two passes over all rewards in fp64: means first, then squared distances from them."""
    mine = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = mine < count
    reward = tl.load(rewards_ptr + mine, mask=inside, other=0.0).to(tl.float64)
    group = tl.load(ids_ptr + mine, mask=inside, other=0)
    members = tl.zeros((BLOCK_B,), tl.float64)
    total = tl.zeros((BLOCK_B,), tl.float64)
    lowest = reward
    highest = reward
    all_members = tl.zeros((), tl.float64)
    all_total = tl.zeros((), tl.float64)
    for first in range(0, count, BLOCK_J):
        other = first + tl.arange(0, BLOCK_J)
        present = other < count
        x = tl.load(rewards_ptr + other, mask=present, other=0.0).to(tl.float64)
        ids = tl.load(ids_ptr + other, mask=present, other=0)
        same = (ids[None, :] == group[:, None]) & present[None, :]
        members += tl.sum(same.to(tl.float64), 1)
        total += tl.sum(tl.where(same, x[None, :], 0.0), 1)
        lowest = tl.minimum(lowest, tl.min(tl.where(same, x[None, :], float("inf")), 1))
        highest = tl.maximum(highest, tl.max(tl.where(same, x[None, :], float("-inf")), 1))
        if SCALE == "batch":
            counts = present & (x - x == 0.0)
            all_members += tl.sum(counts.to(tl.float64), 0)
            all_total += tl.sum(tl.where(counts, x, 0.0), 0)
    mean = total / members
    result = reward - mean
    if SCALE != "none":
        squares = tl.zeros((BLOCK_B,), tl.float64)
        all_squares = tl.zeros((), tl.float64)
        all_mean = all_total / tl.where(all_members > 0.0, all_members, 1.0)
        for first in range(0, count, BLOCK_J):
            other = first + tl.arange(0, BLOCK_J)
            present = other < count
            x = tl.load(rewards_ptr + other, mask=present, other=0.0).to(tl.float64)
            if SCALE == "batch":
                distance = tl.where(present & (x - x == 0.0), x - all_mean, 0.0)
                all_squares += tl.sum(distance * distance, 0)
            else:
                ids = tl.load(ids_ptr + other, mask=present, other=0)
                same = (ids[None, :] == group[:, None]) & present[None, :]
                distance_to_own = tl.where(same, x[None, :] - mean[:, None], 0.0)
                squares += tl.sum(distance_to_own * distance_to_own, 1)
        if SCALE == "batch":
            result /= tl.sqrt(all_squares / tl.where(all_members > 1.0, all_members - 1.0, 1.0)) + eps
        else:
            result /= tl.sqrt(squares / tl.where(members > 1.0, members - 1.0, 1.0)) + eps
    constant = (lowest == highest) & (total == total)
    result = tl.where(constant, 0.0, result)
    tl.store(out_ptr + mine, result.to(out_ptr.dtype.element_ty), mask=inside)


def triton_advantages(rewards_B: Tensor, group_ids_B: Tensor, scale: str, eps: float) -> Tensor:
    """Advantages [B], see `group_advantages`."""
    if rewards_B.dtype not in (torch.float32, torch.float64):
        rewards_B = rewards_B.float()
    out_B = torch.empty(rewards_B.shape, dtype=rewards_B.dtype, device=rewards_B.device)
    count = rewards_B.shape[0]
    with on_device_of(rewards_B):
        advantages_kernel[(triton.cdiv(count, BLOCK_B),)](
            aligned(rewards_B),
            aligned(group_ids_B),
            out_B,
            count,
            float(eps),
            SCALE=scale,
            BLOCK_B=BLOCK_B,
            BLOCK_J=BLOCK_J,
            num_warps=4,
        )
    return out_B
