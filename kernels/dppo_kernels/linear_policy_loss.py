"""Head, log-probs and policy loss in one: the gradient is taken inside the forward pass, three matrix products in all.

A row's gradient depends only on what is known beforehand (old log-prob, advantage, normalizer), so each chunk of
logits is turned into gradients while it is at hand. At sequence level the ratio needs a whole sequence: chunks follow
sequence bounds, and a sequence longer than a chunk is read once for its log-probs and a second time for its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dppo_kernels import backend as backends
from dppo_kernels.head import (
    Head,
    Span,
    WeightGrad,
    accumulates_directly,
    check_inputs,
    deliver,
    valid_rows,
    versions,
)
from dppo_kernels.head_rows import RowStats
from dppo_kernels.policy_loss import (
    PolicyOptions,
    PolicyRows,
    SumCount,
    check_columns,
    cumulated,
    named_metrics,
    policy_rows,
    row_terms,
)
from dppo_kernels.vocab import VocabShard


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    workspace_mib: float = 512,
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
    upstream: float | None = None,
    valid_count: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, SumCount]]:
    """`policy_loss` of `linear_logprob(hidden, weight, targets)`; arguments as for those two, results as of the first.

    A row counts if its mask is set and its target is not negative; the others are left out before the head. The
    metrics include `entropy`. Scratch memory stays within `workspace_mib` (down to chunks of 128 rows); beside it
    there are the gradients of hidden [N, H] and weight [V_local, H] (the latter in fp32).

    The loss can be differentiated once: its gradients are scaled in place. `upstream` is for callers who know the
    gradient that will reach this loss (1.0 where the normalizer says it all): the weight's gradient then goes straight
    into `main_grad` during the forward pass, and the backward pass only checks the promise. `valid_count`: as for
    `linear_logprob`, the rows that count.
    """
    check_inputs(hidden, weight, targets, temperature)
    options = PolicyOptions(clip_low, clip_high, dual_clip, kl_coef, kl, tis_cap, level, aggregation)
    check_columns(targets.shape, old_logprobs, advantages, mask, ref_logprobs, rollout_logprobs)
    name = backends.resolve(backend, hidden)
    shard = VocabShard.of(weight, group, vocab_start, vocab_size)
    valid_N = (mask != 0) & (targets >= 0)
    shard.check_targets(torch.where(valid_N, targets, -1))
    rows = policy_rows(
        old_logprobs, advantages, valid_N, ref_logprobs, rollout_logprobs, cu_seqlens, normalizer, options
    )
    rows_n = valid_rows(valid_N, valid_count)
    head = Head(hidden, weight, targets, rows_n, shard, temperature, workspace_mib, versions(name))
    rows = rows if rows_n is None else _compacted(rows, rows_n)
    with backends.on_device_of(hidden):
        loss, sums_M, entropy = _LinearPolicyLoss.apply(hidden, weight, head, rows, options, name, upstream)
    count = torch.full((), head.count, device=hidden.device)
    return loss, named_metrics(sums_M, count, options, rows, entropy)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        head: Head,
        rows: PolicyRows,
        options: PolicyOptions,
        backend: str,
        upstream: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden_NH = torch.zeros_like(hidden_NH) if want_hidden else None
        weight_grad = None
        if want_weight:
            direct = upstream is not None and accumulates_directly(weight_VH)
            weight_grad = WeightGrad(weight_VH, head.shard.columns, weight_VH.main_grad if direct else None)
        walk = _Walk(head, rows, options, backend, 1.0 if upstream is None else upstream, grad_hidden_NH, weight_grad)
        for span, sequences in _spans(head, rows, options):
            walk.visit(span, sequences)
        ctx.weight, ctx.upstream = weight_VH, upstream
        ctx.grads = (grad_hidden_NH, None if weight_grad is None else weight_grad.sum_VH)
        ctx.mark_non_differentiable(walk.sums_M, walk.entropy)
        return walk.loss, walk.sums_M, walk.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_policy_loss was differentiated a second time: call it again for a new graph")
        (grad_hidden_NH, sum_VH), ctx.grads = ctx.grads, None
        weight_VH, ctx.weight = ctx.weight, None
        if grad_loss is None:
            grad_loss = torch.zeros((), device=weight_VH.device)
        factor = grad_loss if ctx.upstream is None else None
        if ctx.upstream is not None:
            expected = torch.full_like(grad_loss, ctx.upstream)
            message = f"linear_policy_loss: the upstream gradient is not upstream={ctx.upstream} as promised"
            torch._assert_async(torch.isclose(grad_loss, expected, rtol=1e-5, atol=0.0), message)
        if grad_hidden_NH is not None and factor is not None:
            grad_hidden_NH.mul_(factor)
        grad_weight_VH = None if sum_VH is None else deliver(weight_VH, sum_VH, factor)
        return grad_hidden_NH, grad_weight_VH, None, None, None, None, None


class _Walk:
    """Goes over the chunks once, adding up loss, metrics and gradients."""

    def __init__(
        self,
        head: Head,
        rows: PolicyRows,
        options: PolicyOptions,
        backend: str,
        upstream: float,
        grad_hidden_NH: Tensor | None,
        weight_grad: WeightGrad | None,
    ) -> None:
        self._head, self._rows, self._options, self._upstream = head, rows, options, upstream
        self._terms = row_terms(backend)
        self._grad_hidden_NH, self._weight_grad = grad_hidden_NH, weight_grad
        self._learns = grad_hidden_NH is not None or weight_grad is not None
        zeros = torch.zeros(8, dtype=head.dtype, device=head.hidden_NH.device)
        self.loss, self.entropy, self.sums_M = zeros[0].clone(), zeros[1].clone(), zeros[2:].clone()

    def visit(self, span: Span, sequences: slice | None) -> None:
        """One chunk, or one sequence longer than a chunk."""
        pieces = self._pieces(span)
        if len(pieces) == 1:
            chunk = self._head.logits(span)
            stats, kept_max_C = self._head.stats(chunk, entropy=True, keep=self._learns)
            grad_n = self._loss(span, sequences, stats.logprob_C, stats.entropy_C)
            if self._learns:
                self._backward(chunk, stats, grad_n, kept_max_C)
            return
        known: list[RowStats] = []
        for piece in pieces:
            chunk = self._head.logits(piece)
            known.append(self._head.stats(chunk, entropy=True, keep=False)[0])
        logprob_n = torch.cat([stats.logprob_C for stats in known])
        entropy_n = torch.cat([stats.entropy_C for stats in known])
        grad_n = self._loss(span, sequences, logprob_n, entropy_n)
        if self._learns:
            for piece, stats in zip(pieces, known, strict=True):
                part = slice(piece[0] - span[0], piece[1] - span[0])
                self._backward(self._head.logits(piece), stats, grad_n[part], None)

    def _pieces(self, span: Span) -> list[Span]:
        limit = self._head.limit
        return [(a, min(a + limit, span[1])) for a in range(span[0], max(span[1], span[0] + 1), limit)]

    def _loss(self, span: Span, sequences: slice | None, logprob_n: Tensor, entropy_n: Tensor) -> Tensor:
        """Add the rows' loss and metrics; their gradient [n]."""
        loss, grad_n, sums_M = self._terms(logprob_n, self._rows.part(slice(*span), sequences), self._options)
        self.loss += loss
        self.sums_M += sums_M
        self.entropy += entropy_n.sum()
        return grad_n if self._upstream == 1.0 else grad_n * self._upstream

    def _backward(self, chunk: Any, stats: RowStats, grad_n: Tensor, kept_max_C: Tensor | None) -> None:
        self._head.backward(chunk, stats, grad_n, None, self._grad_hidden_NH, self._weight_grad, kept_max_C)


def _spans(head: Head, rows: PolicyRows, options: PolicyOptions) -> list[tuple[Span, slice | None]]:
    """Chunks to visit; at sequence level each covers whole sequences."""
    if options.level != "sequence" or rows.cu_rows is None:
        return [(span, None) for span in head.spans()]
    bounds = rows.cu_rows.tolist()
    spans: list[tuple[Span, slice | None]] = []
    first = 0
    for s in range(1, len(bounds)):
        if bounds[s] - bounds[first] > head.limit and s - 1 > first:
            spans.append(((bounds[first], bounds[s - 1]), slice(first, s - 1)))
            first = s - 1
    spans.append(((bounds[first], bounds[-1]), slice(first, len(bounds) - 1)))
    return spans


def _compacted(rows: PolicyRows, rows_n: Tensor) -> PolicyRows:
    """Only the valid rows, sequences shortened accordingly."""

    def pick(values_N: Tensor | None) -> Tensor | None:
        return None if values_N is None else values_N.index_select(0, rows_n)

    return PolicyRows(
        rows.old_n.index_select(0, rows_n),
        rows.advantages_n.index_select(0, rows_n),
        rows.mask_n.index_select(0, rows_n),
        pick(rows.weights_n),
        pick(rows.ref_n),
        pick(rows.rollout_n),
        pick(rows.sequence_n),
        None if rows.cu_rows is None else cumulated(rows.mask_n)[rows.cu_rows],
    )
