"""Row-wise work on a chunk of logits, in plain torch: statistics, their union over ranks, gradients of the logits.

A chunk is [C, V_local] in the accumulator's type and is consumed: every function may overwrite it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_kernels.vocab import VocabShard

TILE_ELEMENTS = 1 << 18
"""Elements of a row tile (1 MiB in fp32): small enough that its passes stay in cache."""
LOWEST = -200.0
"""A shifted logit below this has no weight in any sum; the floor keeps 0 * inf out of the entropy."""


@dataclass(frozen=True)
class RowStats:
    """What is known of each row of a chunk once all ranks have been heard, [C] each."""

    max_C: Tensor
    """Largest logit."""
    sum_C: Tensor
    """Sum of exp(logit - max)."""
    logprob_C: Tensor
    entropy_C: Tensor


def chunk_stats(
    logits_CV: Tensor, targets_C: Tensor, shard: VocabShard, scale: float, entropy: bool, keep: bool
) -> Tensor:
    """Per row of this rank's columns: max, sum of exp(z - max), sum of exp(z - max) (z - max), target's z; [4, C].

    A target that this rank does not own is NaN. With `keep` the chunk holds exp(z - max) afterwards.
    """
    rows = logits_CV.shape[0]
    stats_4C = torch.zeros(4, rows, dtype=logits_CV.dtype, device=logits_CV.device)
    max_C, sum_C, weighted_C, target_C = stats_4C
    if logits_CV.shape[1] == 0:
        max_C.fill_(float("-inf"))
        target_C.fill_(float("nan"))
        return stats_4C
    local_C, owned_C = _local(targets_C, shard)
    for tile in _tiles(logits_CV):
        z_TV = logits_CV[tile]
        if scale != 1.0:
            z_TV.mul_(scale)
        target_C[tile] = torch.where(owned_C[tile], z_TV.gather(1, local_C[tile, None])[:, 0], float("nan"))
        torch.amax(z_TV, 1, out=max_C[tile])
        shift_T = _finite(max_C[tile])
        if entropy:
            shifted_TV = (z_TV - shift_T[:, None]).clamp_(min=LOWEST)
            torch.exp(shifted_TV, out=z_TV)
            weighted_C[tile] = shifted_TV.mul_(z_TV).sum(1)
        else:
            z_TV.sub_(shift_T[:, None]).exp_()
        torch.sum(z_TV, 1, out=sum_C[tile])
    return stats_4C


def combine(gathered_W4C: Tensor) -> RowStats:
    """Union of the ranks' statistics, in rank order: the same bits on every rank."""
    max_WC, sum_WC, weighted_WC, target_WC = gathered_W4C.unbind(1)
    max_C = max_WC.amax(0)
    shift_WC = (max_WC - _finite(max_C)).clamp(min=LOWEST)
    scale_WC = torch.where(max_WC == float("-inf"), 0.0, shift_WC.exp())
    sum_C = (sum_WC * scale_WC).sum(0)
    weighted_C = (scale_WC * (weighted_WC + shift_WC * sum_WC)).sum(0)
    owned_WC = ~target_WC.isnan()
    target_C = torch.where(owned_WC, target_WC, 0.0).sum(0).masked_fill(~owned_WC.any(0), float("nan"))
    log_sum_C = sum_C.log()
    return RowStats(max_C, sum_C, (target_C - max_C) - log_sum_C, log_sum_C - weighted_C / sum_C)


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
    """Gradient of the logits, in place: grad_logprob (onehot - p) - grad_entropy p (log p + entropy), by `scale`.

    The chunk may have more rows than there are statistics: those are left alone. `kept_max_C`: the chunk already holds
    exp(z - kept_max); otherwise raw logits. A row without upstream gradient is exactly zero, whatever its logits.
    `dtype` is for other versions; here the accumulator's type stays.
    """
    logits_CV = logits_PV[: stats.sum_C.shape[0]]
    shift_C = _finite(stats.max_C)
    grad_C = torch.zeros_like(stats.sum_C) if grad_logprob_C is None else grad_logprob_C * scale
    if grad_entropy_C is None:
        factor_C = -grad_C / stats.sum_C
        if kept_max_C is None:
            for tile in _tiles(logits_CV):
                logits_CV[tile].mul_(scale).sub_(shift_C[tile, None]).exp_().mul_(factor_C[tile, None])
        else:
            factor_C *= (_finite(kept_max_C) - shift_C).clamp(min=LOWEST).exp()
            logits_CV.mul_(factor_C[:, None])
        idle_C = grad_C == 0
    else:
        grad_entropy_C = grad_entropy_C * scale
        offset_C = stats.entropy_C - stats.sum_C.log()
        for tile in _tiles(logits_CV):
            z_TV = logits_CV[tile].mul_(scale).sub_(shift_C[tile, None]).clamp_(min=LOWEST)
            slope_TV = (z_TV + offset_C[tile, None]).mul_(grad_entropy_C[tile, None]).add_(grad_C[tile, None])
            z_TV.exp_().mul_(slope_TV).mul_(-1.0 / stats.sum_C[tile, None])
        idle_C = (grad_C == 0) & (grad_entropy_C == 0)
    if logits_CV.shape[1]:
        local_C, owned_C = _local(targets_C, shard)
        logits_CV.scatter_add_(1, local_C[:, None], torch.where(owned_C, grad_C, 0.0)[:, None])
    logits_CV.index_fill_(0, idle_C.nonzero()[:, 0], 0.0)
    return logits_PV


def _local(targets_C: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank (0 where another rank owns it) and whether it is owned here."""
    local_C = targets_C - shard.start
    owned_C = (local_C >= 0) & (local_C < shard.columns)
    return torch.where(owned_C, local_C, 0), owned_C


def _finite(max_C: Tensor) -> Tensor:
    """A shift that never makes (-inf) - (-inf)."""
    return torch.where(max_C == float("-inf"), 0.0, max_C)


def _tiles(logits_CV: Tensor) -> list[slice]:
    rows = max(1, TILE_ELEMENTS // max(1, logits_CV.shape[1]))
    return [slice(a, min(a + rows, logits_CV.shape[0])) for a in range(0, logits_CV.shape[0], rows)]
