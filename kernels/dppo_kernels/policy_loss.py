"""The clipped policy loss: ratio, asymmetric and dual clip, KL penalty, truncated importance weights, aggregation.

Value and gradient come from one pass, written out by hand: what the loss does at its edges (a clip bound, a huge
log-ratio, a masked NaN) is then a rule and not an accident of automatic differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dppo_kernels import backend as backends

MAX_LOG_RATIO = 20.0
METRICS = ("ratio", "approx_kl", "clip_fraction_low", "clip_fraction_high", "kl_ref", "tis_weight", "entropy")


class SumCount(NamedTuple):
    """A metric as a sum and what to divide it by, both 0-d and detached: add over micro-batches, then divide."""

    sum: Tensor
    count: Tensor


@dataclass(frozen=True)
class PolicyOptions:
    """The loss's settings, checked."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl: str = "k3"
    tis_cap: float | None = None
    level: str = "token"
    aggregation: str = "token-mean"

    def __post_init__(self) -> None:
        _one_of("kl", self.kl, ("k1", "k2", "k3"))
        _one_of("level", self.level, ("token", "sequence"))
        _one_of(
            "aggregation", self.aggregation, ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
        )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip}: it must be above 1, or None")

    @property
    def by_sequence(self) -> bool:
        """Whether a token's loss depends on its sequence."""
        return self.level == "sequence" or self.aggregation.startswith("seq-")


@dataclass(frozen=True)
class PolicyRows:
    """Inputs of the loss for n rows, packed in order."""

    old_n: Tensor
    advantages_n: Tensor
    mask_n: Tensor
    """bool: rows that count."""
    weights_n: Tensor | None
    """A row's share of the loss, normalizer included, 0 where masked; None: a kernel derives it."""
    ref_n: Tensor | None
    rollout_n: Tensor | None
    sequence_n: Tensor | None
    """int64: which sequence a row belongs to, ascending; None where the loss needs no sequences."""
    cu_rows: Tensor | None
    """int64 [S + 1]: rows of sequence s are cu_rows[s] : cu_rows[s + 1]."""

    def part(self, span: slice, sequences: slice | None = None) -> PolicyRows:
        """Some rows of it; `sequences` are those the rows belong to, which must then be whole."""

        def cut(values_n: Tensor | None) -> Tensor | None:
            return None if values_n is None else values_n[span]

        cu_rows, sequence_n = None, None
        if sequences is not None and self.cu_rows is not None and self.sequence_n is not None:
            cu_rows = self.cu_rows[sequences.start : sequences.stop + 1] - span.start
            sequence_n = self.sequence_n[span] - sequences.start
        return PolicyRows(
            self.old_n[span],
            self.advantages_n[span],
            self.mask_n[span],
            cut(self.weights_n),
            cut(self.ref_n),
            cut(self.rollout_n),
            sequence_n,
            cu_rows,
        )


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    tis_cap: float | None = None,
    level: str = "token",
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, SumCount]]:
    """Policy loss of packed tokens [N] (fp32 0-d), differentiable in `logprobs`, and its metrics.

    The ratio is exp(logprobs - old), the log-ratio clamped to +-20 with zero gradient beyond; on a clip edge the
    unclipped branch wins. `level="sequence"` takes the mean log-ratio of a sequence (GSPO). The KL penalty to
    `ref_logprobs` is k1 (d), k2 (d^2 / 2) or k3 (exp(-d) - 1 + d) of d = logprobs - ref. With `rollout_logprobs` and
    `tis_cap`, the policy term is weighted by min(exp(old - rollout), cap), without gradient (at sequence level: of the
    sequence's mean).

    `normalizer` divides the loss: the global count over all micro-batches and data-parallel ranks. Its default is this
    call's count of valid tokens, or of non-empty sequences for `seq-*`; `constant` needs one. `cu_seqlens` [S + 1]
    bounds the sequences where level or aggregation needs them. Masked tokens leave no trace, whatever they hold.

    Metrics are sums over valid tokens with their count (at sequence level each token carries its sequence's ratio and
    weight); `approx_kl` sums ratio - 1 - log ratio.
    """
    options = PolicyOptions(clip_low, clip_high, dual_clip, kl_coef, kl, tis_cap, level, aggregation)
    check_columns(logprobs.shape, old_logprobs, advantages, mask, ref_logprobs, rollout_logprobs)
    if backends.resolve(backend, logprobs) == "triton":
        from dppo_kernels.policy_loss_triton import TritonPolicyLoss

        check_settings(options, cu_seqlens, normalizer)
        bounds = cu_seqlens.to(logprobs.device) if options.by_sequence and cu_seqlens is not None else None
        normalizer = normalizer.to(logprobs.device) if isinstance(normalizer, Tensor) else normalizer
        rows = PolicyRows(old_logprobs, advantages, mask, None, ref_logprobs, rollout_logprobs, None, bounds)
        loss, sums_M, count = TritonPolicyLoss.apply(logprobs, rows, options, normalizer)
    else:
        rows = policy_rows(
            old_logprobs, advantages, mask != 0, ref_logprobs, rollout_logprobs, cu_seqlens, normalizer, options
        )
        loss, sums_M = _PolicyLoss.apply(logprobs, rows, options)
        count = rows.mask_n.sum()
    return loss, named_metrics(sums_M, count, options, rows)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs_N: Tensor, rows: PolicyRows, options: PolicyOptions) -> tuple[Tensor, Tensor]:
        loss, grad_N, sums_M = torch_terms(logprobs_N, rows, options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_N)
        ctx.dtype = logprobs_N.dtype
        ctx.mark_non_differentiable(sums_M)
        return loss, sums_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = ctx.saved_tensors
        return (grad_N * grad_loss).to(ctx.dtype), None, None


def row_terms(backend: str) -> Any:
    """The function that computes loss, gradient and metric sums of rows on a backend."""
    if backend == "torch":
        return torch_terms
    from dppo_kernels.policy_loss_triton import triton_terms

    return triton_terms


def torch_terms(logprobs_n: Tensor, rows: PolicyRows, options: PolicyOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss (0-d), its gradient [n], metric sums [6] in the order of METRICS."""
    wide = torch.float64 if logprobs_n.dtype == torch.float64 else torch.float32
    mask_n = rows.mask_n

    def clean(values_n: Tensor | None) -> Tensor:
        if values_n is None:
            raise ValueError("rows carry no weights: make them with policy_rows")
        return torch.where(mask_n, values_n.to(wide), 0.0)

    logprobs_n, old_n, advantages_n = clean(logprobs_n), clean(rows.old_n), clean(rows.advantages_n)
    weights_n = clean(rows.weights_n)
    log_ratio_n = logprobs_n - old_n
    mismatch_n = None
    if rows.rollout_n is not None and options.tis_cap is not None:
        mismatch_n = old_n - clean(rows.rollout_n)
    if options.level == "sequence":
        log_ratio_n = _sequence_mean(log_ratio_n, rows)
        mismatch_n = None if mismatch_n is None else _sequence_mean(mismatch_n, rows)

    clamped_n = log_ratio_n.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_n = clamped_n.exp()
    plain_n = -advantages_n * ratio_n
    clipped_n = -advantages_n * ratio_n.clamp(1 - options.clip_low, 1 + options.clip_high)
    moves_n = (plain_n >= clipped_n) & (log_ratio_n.abs() <= MAX_LOG_RATIO)
    value_n = torch.maximum(plain_n, clipped_n)
    if options.dual_clip is not None:
        ceiling_n = -advantages_n * options.dual_clip
        capped_n = (advantages_n < 0) & (value_n > ceiling_n)
        value_n = torch.where(capped_n, ceiling_n, value_n)
        moves_n &= ~capped_n
    slope_n = torch.where(moves_n, plain_n, 0.0)
    sums = [
        torch.where(mask_n, ratio_n, 0.0).sum(),
        torch.where(mask_n, _excess(clamped_n), 0.0).sum(),
        (mask_n & (ratio_n < 1 - options.clip_low) & (advantages_n < 0)).sum().to(wide),
        (mask_n & (ratio_n > 1 + options.clip_high) & (advantages_n > 0)).sum().to(wide),
    ]
    tis_n = None
    if mismatch_n is not None:
        tis_n = mismatch_n.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=options.tis_cap)
        value_n, slope_n = value_n * tis_n, slope_n * tis_n
    grad_n = weights_n * slope_n
    if options.level == "sequence":
        grad_n = _sequence_mean(grad_n, rows)
    kl_sum = value_n.new_zeros(())
    if rows.ref_n is not None:
        kl_n, kl_slope_n = _kl(clean(rows.ref_n) - logprobs_n, options.kl)
        kl_sum = torch.where(mask_n, kl_n, 0.0).sum()
        value_n = value_n + options.kl_coef * kl_n
        grad_n = grad_n + weights_n * (options.kl_coef * kl_slope_n)
    tis_sum = value_n.new_zeros(()) if tis_n is None else torch.where(mask_n, tis_n, 0.0).sum()
    loss = torch.where(mask_n, weights_n * value_n, 0.0).sum()
    return loss, torch.where(mask_n, grad_n, 0.0), torch.stack([*sums, kl_sum, tis_sum])


def policy_rows(
    old_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    ref_N: Tensor | None,
    rollout_N: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: float | Tensor | None,
    options: PolicyOptions,
) -> PolicyRows:
    """Rows with their share of the loss under the aggregation."""
    check_settings(options, cu_seqlens, normalizer)
    sequence_N, cu_rows, counts_S = None, None, None
    if options.by_sequence and cu_seqlens is not None:
        cu_rows = cu_seqlens.to(device=mask_N.device, dtype=torch.int64)
        if not cu_rows.is_cuda and (int(cu_rows[0]) != 0 or int(cu_rows[-1]) != mask_N.shape[0]):
            raise ValueError(f"cu_seqlens runs {int(cu_rows[0])}..{int(cu_rows[-1])}: expected 0..{mask_N.shape[0]}")
        sequence_N = torch.searchsorted(cu_rows[1:], torch.arange(mask_N.shape[0], device=mask_N.device), right=True)
        counts_S = cumulated(mask_N)[cu_rows].diff()
    by_sequence = options.aggregation.startswith("seq-")
    if normalizer is None:
        counted = (counts_S > 0).sum() if by_sequence and counts_S is not None else mask_N.sum()
        normalizer = counted.clamp(min=1)
    weights_N = mask_N.to(torch.float64)
    if options.aggregation == "seq-mean-token-mean" and counts_S is not None and sequence_N is not None:
        weights_N = weights_N / counts_S.clamp(min=1)[sequence_N]
    weights_N = (weights_N / normalizer).to(torch.float64 if old_N.dtype == torch.float64 else torch.float32)
    return PolicyRows(old_N, advantages_N, mask_N, weights_N, ref_N, rollout_N, sequence_N, cu_rows)


def check_settings(options: PolicyOptions, cu_seqlens: Tensor | None, normalizer: float | Tensor | None) -> None:
    """What some settings cannot do without."""
    if normalizer is None and options.aggregation == "constant":
        raise ValueError("normalizer=None with aggregation='constant': give the constant to divide by")
    if options.by_sequence and cu_seqlens is None:
        raise ValueError(f"cu_seqlens=None: level={options.level!r}, aggregation={options.aggregation!r} need it")


def cumulated(mask_N: Tensor) -> Tensor:
    """[N + 1]: valid rows before each position."""
    return torch.nn.functional.pad(mask_N.cumsum(0), (1, 0))


def named_metrics(
    sums_M: Tensor, count: Tensor, options: PolicyOptions, rows: PolicyRows, entropy: Tensor | None = None
) -> dict[str, SumCount]:
    """Metric sums under their names; those without an input are left out."""
    count = count.to(sums_M.dtype)
    named = {name: SumCount(sums_M[i], count) for i, name in enumerate(METRICS[:-1])}
    if rows.ref_n is None:
        del named["kl_ref"]
    if rows.rollout_n is None or options.tis_cap is None:
        del named["tis_weight"]
    if entropy is not None:
        named["entropy"] = SumCount(entropy, count)
    return named


def check_columns(
    shape: torch.Size,
    old_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    ref_N: Tensor | None,
    rollout_N: Tensor | None,
) -> None:
    """Every column is packed, one value per token."""
    columns = dict(
        old_logprobs=old_N, advantages=advantages_N, mask=mask_N, ref_logprobs=ref_N, rollout_logprobs=rollout_N
    )
    for name, values in columns.items():
        if values is not None and (len(shape) != 1 or values.shape != shape):
            raise ValueError(
                f"{name} {tuple(values.shape)}: expected packed tokens, one value for each of {tuple(shape)}"
            )


def _kl(delta_n: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Estimate of KL(policy, reference) from delta = ref - logprob, and its slope in logprob."""
    clamped_n = delta_n.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        value_n, slope_n = -clamped_n, torch.ones_like(clamped_n)
    elif kind == "k2":
        value_n, slope_n = clamped_n.square() / 2, -clamped_n
    else:
        value_n = _excess(clamped_n)
        slope_n = -(value_n + clamped_n)
    return value_n, torch.where(delta_n.abs() <= MAX_LOG_RATIO, slope_n, 0.0)


def _excess(x_n: Tensor) -> Tensor:
    """exp(x) - 1 - x, without cancellation near 0."""
    series_n = torch.full_like(x_n, 1 / 40320)
    for divisor in (5040, 720, 120, 24, 6, 2):
        series_n = series_n * x_n + 1 / divisor
    return torch.where(x_n.abs() < 0.5, series_n * x_n.square(), x_n.exp() - 1 - x_n)


def _sequence_mean(values_n: Tensor, rows: PolicyRows) -> Tensor:
    """Mean over the valid rows of each row's sequence, [n]."""
    if rows.sequence_n is None or rows.cu_rows is None:
        raise ValueError("cu_seqlens=None: sequence level needs it")
    sums_S = torch.zeros(rows.cu_rows.shape[0] - 1, dtype=torch.float64, device=values_n.device)
    sums_S.index_add_(0, rows.sequence_n, values_n.double())
    counts_S = cumulated(rows.mask_n)[rows.cu_rows].diff()
    return (sums_S / counts_S.clamp(min=1))[rows.sequence_n].to(values_n.dtype)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")
