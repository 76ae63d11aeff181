"""Group-relative advantages: a reward less its group's mean, over a standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor

from dppo_kernels import backend as backends

SCALES = ("std", "none", "batch")


@torch.no_grad()
def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, scale: str = "std", eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Advantages [B] of rewards [B]; rows with the same id (any int64, in any order) are a group.

    scale "std" divides by the group's unbiased standard deviation + eps, "batch" by that of all finite rewards, "none"
    not at all. A constant group, and a group of one, is exactly 0. A NaN reward makes its own group NaN, no other.
    Sums are taken in fp64; the result is fp32 (fp64 for fp64 rewards).
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: choose one of {', '.join(SCALES)}")
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, group_ids {tuple(group_ids.shape)}: expected one id per reward"
        )
    if group_ids.is_floating_point() or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids are {group_ids.dtype}: expected integers")
    if rewards.numel() == 0:
        return torch.empty_like(rewards, dtype=_result_type(rewards))
    if backends.resolve(backend, rewards) == "torch":
        return _torch_advantages(rewards, group_ids, scale, eps)
    from dppo_kernels.group_advantages_triton import triton_advantages

    return triton_advantages(rewards, group_ids, scale, eps)


def _torch_advantages(rewards_B: Tensor, group_ids_B: Tensor, scale: str, eps: float) -> Tensor:
    values_B = rewards_B.double()
    ids_G, group_B, counts_G = torch.unique(group_ids_B, return_inverse=True, return_counts=True)
    groups = ids_G.shape[0]

    def total(x_B: Tensor) -> Tensor:
        return x_B.new_zeros(groups).index_add_(0, group_B, x_B)

    centred_B = values_B - (total(values_B) / counts_G)[group_B]
    lowest_G = values_B.new_full((groups,), torch.inf).scatter_reduce_(0, group_B, values_B, "amin")
    highest_G = values_B.new_full((groups,), -torch.inf).scatter_reduce_(0, group_B, values_B, "amax")
    result_B = centred_B
    if scale == "std":
        deviation_G = (total(centred_B.square()) / (counts_G - 1).clamp(min=1)).sqrt()
        result_B = centred_B / (deviation_G + eps)[group_B]
    elif scale == "batch":
        finite_B = values_B[values_B.isfinite()]
        mean = finite_B.sum() / max(1, finite_B.numel())
        deviation = ((finite_B - mean).square().sum() / max(1, finite_B.numel() - 1)).sqrt()
        result_B = centred_B / (deviation + eps)
    return torch.where((lowest_G == highest_G)[group_B], 0.0, result_B).to(_result_type(rewards_B))


def _result_type(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32
