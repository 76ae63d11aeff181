"""One step over packed micro-batches under Megatron's pipeline schedule, for training and for log-probs.

The loss is normalised once, by a count over all micro-batches and data-parallel ranks, and gradients are summed
and never averaged: so neither depends on how the global batch was cut. R loss rows, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from dppo_kernels import linear_logprob
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dppo_mcore.learn import statistics
from dppo_mcore.learn.batches import fill_up, to_device
from dppo_mcore.learn.flops import total_flops
from dppo_mcore.learn.loss import Head, Loss, pair
from dppo_mcore.learn.state import Learner
from dppo_mcore.runtime import device
from dppo_mcore.types import PackedBatch

EVERY_COLUMN = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")
"""What a rank without a micro-batch of its own must bring to any loss, without a value in it."""


@dataclass(frozen=True)
class StepResult:
    """What a training step did, equal on every rank."""

    loss: float
    grad_norm: float
    lr: float
    applied: bool
    """False when the gradient was not finite and the optimizer left alone."""
    seconds: float
    normalizer: float = 0.0
    """What the loss was divided by: learnt tokens, sequences, or sequences times a constant."""
    tokens: float = 0.0
    """Tokens of the global batch that went through the model, shared prompts once, padding not."""
    flops: float = 0.0
    """Operations of its forward and backward passes, vision tower included."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over the global batch."""


class BadGradientError(RuntimeError):
    """Too many steps in a row without a finite gradient."""


def train_step(state: Learner, micro_batches: Sequence[PackedBatch], loss: Loss) -> StepResult:
    """Forward, backward and one optimizer step on this data-parallel rank's share of the global batch.

    Every rank of a replica passes the same list; replicas may pass lists of unequal length, even empty ones.
    """
    started = time.perf_counter()
    normalizer = statistics.sum_over_data_parallel(
        sum(loss.count(batch) for batch in micro_batches) + loss.extra_count()
    )
    for chunk in state.chunks:
        chunk.zero_grad_buffer()

    def evaluate(hidden_RH: Tensor, head: Head, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        value, entries = loss(hidden_RH, head, batch, max(normalizer, 1.0))
        # A micro-batch without rows still has to send its (zero) gradient up the pipeline.
        value = value + hidden_RH.sum() * 0 if not batch.targets_R.numel() else value
        return value, {**entries, "loss": pair(value.detach().double(), 0.0)}

    collected = _run_schedule(state, micro_batches, evaluate, forward_only=False)
    local = statistics.total(collected) if statistics.on_last_stage() else {}
    work = total_flops(micro_batches, state.qwen)
    local["work"] = (work.training(state.config.model), work.tokens)
    totals = statistics.reduce(local)
    flops, tokens = totals.pop("work")
    lr = state.schedule.lr(state.progress.phase_steps)
    grad_norm, applied = state.optimizer.step(lr, state.config.optimizer.clip_grad)
    state.progress.count(applied)
    loss_value = totals.pop("loss", (0.0, 0.0))[0]
    if not applied:
        _complain(state, micro_batches, collected, grad_norm)
    return StepResult(
        loss=loss_value,
        grad_norm=grad_norm,
        lr=lr,
        applied=applied,
        seconds=time.perf_counter() - started,
        normalizer=normalizer,
        tokens=tokens,
        flops=flops,
        metrics=statistics.means(totals),
    )


@torch.no_grad()
def logprobs(
    state: Learner, micro_batches: Sequence[PackedBatch], temperature: float = 1.0, entropy: bool = False
) -> list[Tensor]:
    """Log-probability [R] of every micro-batch's targets, fp32, on all ranks of the replica.

    With `entropy`, each tensor is [2, R]: log-probs, then entropies.
    """

    def evaluate(hidden_RH: Tensor, head: Head, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprob_R, entropy_R = linear_logprob(
            hidden_RH,
            head.weight_VH,
            batch.targets_R,
            temperature=temperature,
            entropy=entropy,
            valid_count=batch.targets_R.numel(),
            **head.arguments(),
        )
        rows = torch.stack([logprob_R, entropy_R]) if entropy else logprob_R
        return logprob_R.new_zeros(()), {"rows": rows}

    collected = _run_schedule(state, micro_batches, evaluate, forward_only=True)
    results = [entry["rows"] for entry in collected[: len(micro_batches)]]
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return results
    sizes = [batch.targets_R.numel() for batch in micro_batches]
    leading = (2,) if entropy else ()
    if results:
        flat = torch.cat(results, dim=-1)
    else:
        flat = torch.empty(*leading, sum(sizes), device=device.device())
    torch.distributed.broadcast(
        flat,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return [part.contiguous() for part in flat.split(sizes, dim=-1)]


Evaluate = Callable[[Tensor, Head, PackedBatch], tuple[Tensor, dict[str, Tensor]]]


def _run_schedule(
    state: Learner, micro_batches: Sequence[PackedBatch], evaluate: Evaluate, *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """Per micro-batch what `evaluate` reported, on the last stage; elsewhere an empty list."""
    parallel = state.config.parallel
    virtual = len(state.chunks) > 1
    columns = tuple(micro_batches[0].columns) if micro_batches else EVERY_COLUMN
    multiple = parallel.pipeline_model_parallel_size if virtual else 1
    media = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    filled = fill_up(micro_batches, multiple, state.pad_multiple, columns)
    placed = [to_device(batch, device.device(), media) for batch in filled]
    head = state.head()
    none_yet = torch.zeros((), dtype=torch.int)

    def forward_step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)
        output = model(batch)

        def finish(hidden_RH: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            assert head is not None
            value, report = evaluate(hidden_RH, head, batch)
            return value, none_yet, report

        return output, finish

    iterators = [iter(placed) for _ in state.chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if virtual else iterators[0],
        model=state.chunks if virtual else state.chunks[0],
        num_microbatches=len(placed),
        seq_length=max(batch.token_ids_L.numel() for batch in placed),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _complain(
    state: Learner, micro_batches: Sequence[PackedBatch], collected: Sequence[dict[str, Tensor]], grad_norm: float
) -> None:
    """Warn about a step without a finite gradient; after too many in a row, end the run with the batch's name."""
    finite = [bool(torch.isfinite(entry["loss"][0])) for entry in collected[: len(micro_batches)]]
    suspects = [batch for batch, fine in zip(micro_batches, finite, strict=False) if not fine]
    ours = [
        [f"{ref.sample_id}#{ref.index}" for batch in some for ref in batch.sequences]
        for some in (suspects, micro_batches)
    ]
    everywhere: list[list[list[str]]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, ours)
    names = list(dict.fromkeys(name for found, _ in everywhere for name in found))
    names = names or list(dict.fromkeys(name for _, found in everywhere for name in found))
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    progress = state.progress
    message = (
        f"gradient norm {grad_norm} in {progress.phase} step {progress.phase_steps}; sequences of the batch: {shown}"
    )
    state.log.warning("%s; step skipped (%d in a row)", message, progress.bad_in_a_row)
    if progress.bad_in_a_row >= state.config.optimizer.max_bad_steps:
        raise BadGradientError(
            f"{message}; {progress.bad_in_a_row} steps in a row had no finite gradient: "
            "look at these samples, or lower the learning rate"
        )
