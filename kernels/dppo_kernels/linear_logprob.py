"""Log-prob of a target and entropy of a row, from hidden states and the vocabulary head, logits never whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dppo_kernels import backend as backends
from dppo_kernels.head import (
    Head,
    WeightGrad,
    accumulates_directly,
    check_inputs,
    deliver,
    valid_rows,
    versions,
)
from dppo_kernels.head_rows import RowStats
from dppo_kernels.vocab import VocabShard


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    workspace_mib: float = 512,
    valid_count: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of `targets` under softmax(hidden x weight^T / temperature), and its entropy in nats if asked.

    hidden [N, H], weight [V_local, H], targets [N] global ids (negative: masked, value 0 and gradient exactly 0).
    Returns fp32 [N] and [N] or None, whatever the input type. Differentiable in hidden and weight; the backward pass
    computes the logits again. With a `group`, the vocabulary is spread over its ranks in rank order, all ranks call
    with the same hidden and targets, values are bit-identical on all, and hidden's gradient is already summed.
    `vocab_start` is this rank's first id, `vocab_size` the ids of the whole vocabulary (further columns are padding);
    where either is None a group exchanges its sizes. A weight with `main_grad` gets its gradient there.
    `workspace_mib` bounds the scratch memory down to chunks of 128 rows, for a rank with an even share of the
    vocabulary (all ranks take chunks of the same rows). `valid_count` is how many rows count, for callers who know:
    the device need not be asked. Backend "triton_fused" computes the forward values without scratch memory, in one
    kernel.
    """
    check_inputs(hidden, weight, targets, temperature)
    name = backends.resolve(backend, hidden, ("torch", "triton", "triton_fused"))
    shard = VocabShard.of(weight, group, vocab_start, vocab_size)
    shard.check_targets(targets)
    rows_n = valid_rows(targets >= 0, valid_count)
    with backends.on_device_of(hidden):
        logprob_N, entropy_N = _LinearLogprob.apply(
            hidden, weight, targets, rows_n, shard, float(temperature), entropy, workspace_mib, name
        )
    return logprob_N, entropy_N if entropy else None


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        rows_n: Tensor | None,
        shard: VocabShard,
        temperature: float,
        entropy: bool,
        workspace_mib: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        head = Head(hidden_NH, weight_VH, targets_N, rows_n, shard, temperature, workspace_mib, versions(backend))
        if backend == "triton_fused":
            from dppo_kernels.linear_logprob_triton import fused_stats

            stats = fused_stats(head, entropy)
        else:
            stats = _chunked_stats(head, entropy)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, rows_n, stats.max_C, stats.sum_C, stats.entropy_C)
        ctx.call = (shard, temperature, workspace_mib, backend)
        ctx.set_materialize_grads(False)
        count = hidden_NH.shape[0]
        logprob_N, entropy_N = _scatter(stats.logprob_C, rows_n, count), _scatter(stats.entropy_C, rows_n, count)
        if not entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_N: Tensor | None, grad_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, targets_N, rows_n, max_n, sum_n, entropy_n = ctx.saved_tensors
        shard, temperature, workspace_mib, backend = ctx.call
        head = Head(hidden_NH, weight_VH, targets_N, rows_n, shard, temperature, workspace_mib, versions(backend))
        grad_logprob_n, grad_entropy_n = _compact(grad_logprob_N, head), _compact(grad_entropy_N, head)
        grad_hidden_NH = torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None
        weight_grad = None
        if ctx.needs_input_grad[1]:
            into = weight_VH.main_grad if accumulates_directly(weight_VH) else None
            weight_grad = WeightGrad(weight_VH, shard.columns, into)
        for span in head.spans():
            chunk = head.logits(span)
            here = chunk.here
            stats = RowStats(max_n[here], sum_n[here], max_n[here], entropy_n[here])
            head.backward(
                chunk,
                stats,
                None if grad_logprob_n is None else grad_logprob_n[here],
                None if grad_entropy_n is None else grad_entropy_n[here],
                grad_hidden_NH,
                weight_grad,
            )
        grad_weight_VH = None if weight_grad is None else deliver(weight_VH, weight_grad.sum_VH, None)
        return grad_hidden_NH, grad_weight_VH, None, None, None, None, None, None, None


def _chunked_stats(head: Head, entropy: bool) -> RowStats:
    """Statistics of all valid rows, [n] each."""
    parts: list[RowStats] = []
    for span in head.spans():
        chunk = head.logits(span)
        stats, _ = head.stats(chunk, entropy, keep=False)
        parts.append(stats)
    return RowStats(
        torch.cat([part.max_C for part in parts]),
        torch.cat([part.sum_C for part in parts]),
        torch.cat([part.logprob_C for part in parts]),
        torch.cat([part.entropy_C for part in parts]),
    )


def _scatter(values_n: Tensor, rows_n: Tensor | None, count: int) -> Tensor:
    """Spread compacted rows over all N, 0 where masked."""
    if rows_n is None:
        return values_n.clone()
    return values_n.new_zeros(count).index_copy_(0, rows_n, values_n)


def _compact(values_N: Tensor | None, head: Head) -> Tensor | None:
    if values_N is None:
        return None
    return values_N.to(head.dtype) if head.rows_n is None else values_N.index_select(0, head.rows_n).to(head.dtype)
