"""Rank functions for the exactness matrix: loss and whole gradients of one global batch, however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from dppo_mcore.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from dppo_mcore.learn import state as learn_state
from dppo_mcore.learn.loss import CrossEntropy, Loss, PolicyLoss
from dppo_mcore.learn.muon import Muon
from dppo_mcore.learn.state import Learner, build
from dppo_mcore.learn.step import train_step
from dppo_mcore.model.weights import iter_hf_weights
from dppo_mcore.runtime import parallel
from dppo_mcore.types import PackedBatch
from tests.learn.batches import Question, pack, random_questions

COLUMNS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")
LOSSES: dict[str, Loss] = {
    "sft": CrossEntropy(),
    "rl": PolicyLoss(kl_coef=0.05, tis_cap=2.0, dual_clip=3.0),
    "gspo": PolicyLoss(level="sequence", aggregation="seq-mean-token-mean", kl_coef=0.02),
    "dr_grpo": PolicyLoss(aggregation="constant", constant=24.0),
    "on_policy": PolicyLoss(kl_coef=0.05),
}
Outcome = tuple[float, float, dict[str, torch.Tensor]]
"""Loss, gradient norm, gradients under their Hugging Face names."""


def config(model: str, layout: ParallelConfig, optimizer: str = "adam", **model_options: Any) -> Config:
    """fp32, everything learns."""
    return Config(
        run=RunConfig(model=model),
        parallel=layout,
        model=ModelConfig(dtype="fp32", freeze_vision=False, **model_options),
        optimizer=OptimizerConfig(optimizer=optimizer, clip_grad=0.0),
    )


def build_in_buckets(options: Config) -> Learner:
    """A learner whose gradients are reduced in many buckets, as a large model's are."""
    buffers = partial(learn_state.DistributedDataParallelConfig, bucket_size=256)
    with mock.patch.object(learn_state, "DistributedDataParallelConfig", buffers):
        return build(options)


def step_to_gradient(state: Learner) -> None:
    """Make an optimizer step set the weights to the gradient: what then lies in the model is the whole path's work."""
    if isinstance(state.optimizer, Muon):
        owned = state.optimizer.owned

        def take(entries: Sequence[Any], *_: float) -> None:
            for entry in entries:
                entry.main.copy_(entry.grad)

        state.optimizer._step_matrices = take  # type: ignore[method-assign]
        state.optimizer._step_adamw = take  # type: ignore[method-assign]
        assert owned or parallel_state.get_data_parallel_world_size() > 1
        return
    for shard in state.optimizer.shards:  # type: ignore[attr-defined]

        def copy(groups: Any = shard.optimizer.param_groups) -> None:
            with torch.no_grad():
                for group in groups:
                    for parameter in group["params"]:
                        parameter.copy_(parameter.grad)

        shard.optimizer.step = copy


def cut(questions: Sequence[Question], how: str, state: Learner) -> list[PackedBatch]:
    """This data-parallel rank's micro-batches of the global batch."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    kind, _, share = how.partition("-")
    if kind in ("masked", "idle"):
        mine = list(questions) if rank == 0 else list(questions[:2]) if kind == "masked" else []
    else:
        mine = list(questions[rank::size])
    count = {"one": 1, "four": 4}.get(kind, max(1, len(mine)))
    batches = [
        pack(mine[i : i + count], state.qwen, share != "unshared", state.pad_multiple)
        for i in range(0, len(mine), count)
    ]
    if kind == "masked" and rank:
        batches = [without_rows(batch) for batch in batches]
    return batches


def without_rows(batch: PackedBatch) -> PackedBatch:
    """The same tokens, none of them learnt."""
    return replace(
        batch,
        loss_rows_R=batch.loss_rows_R[:0],
        targets_R=batch.targets_R[:0],
        cu_rows=torch.zeros_like(batch.cu_rows),
        columns={name: column[:0] for name, column in batch.columns.items()},
    )


def without_columns(batch: PackedBatch, *names: str) -> PackedBatch:
    """The batch without some columns."""
    return replace(batch, columns={name: column for name, column in batch.columns.items() if name not in names})


def outcomes(
    model: str,
    layout: ParallelConfig,
    cases: Sequence[tuple[str, str]],
    optimizer: str = "adam",
    questions: int = 8,
    **options: Any,
) -> dict[tuple[str, str], Outcome] | None:
    """Per (loss, cut) what one step does; on rank 0 only, to keep the pipe small."""
    parallel.reinit(layout, seed=0)
    state = build_in_buckets(config(model, layout, optimizer, **options))
    step_to_gradient(state)
    batch = random_questions(state.qwen, questions, 3, columns=COLUMNS)
    weights = [p.detach().clone() for m in state.models for p in m.parameters()]
    found: dict[tuple[str, str], Outcome] = {}
    for loss, how in cases:
        micro_batches = cut(batch, how, state)
        if loss == "on_policy":
            micro_batches = [without_columns(b, "old_logprobs") for b in micro_batches]
        result = train_step(state, micro_batches, LOSSES[loss])
        gradients = {name: tensor.clone() for name, tensor in iter_hf_weights(state.models, state.qwen)}
        found[loss, how] = (result.loss, result.grad_norm, gradients)
        with torch.no_grad():
            for parameter, saved in zip((p for m in state.models for p in m.parameters()), weights, strict=True):
                parameter.copy_(saved)
    return found if torch.distributed.get_rank() == 0 else None
