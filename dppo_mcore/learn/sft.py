"""One SFT step: cross-entropy per token of a global batch of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dppo_mcore.data.packing import pack_conversations
from dppo_mcore.learn.loss import CrossEntropy
from dppo_mcore.learn.rl_metrics import step_metrics
from dppo_mcore.learn.state import Learner
from dppo_mcore.learn.step import StepResult, train_step
from dppo_mcore.types import PackedBatch, Prompt


@dataclass(frozen=True)
class SftResult:
    """What an SFT step did, equal on every rank."""

    update: StepResult
    metrics: dict[str, float]
    """Under their logged names."""


def sft_step(state: Learner, conversations: Sequence[Prompt]) -> SftResult:
    """One optimizer step on this data-parallel rank's conversations (with `loss_mask`)."""
    update = train_step(state, pack(state, conversations), CrossEntropy())
    metrics = {"sft/loss": update.loss, "sft/tokens": update.normalizer} | {
        f"sft/loss/{name.removeprefix('nll/')}": value
        for name, value in update.metrics.items()
        if name.startswith("nll/")
    }
    return SftResult(update, metrics | step_metrics([update], state.config.model.dtype))


def pack(state: Learner, conversations: Sequence[Prompt]) -> list[PackedBatch]:
    """Micro-batches of these conversations."""
    data = state.config.data
    return pack_conversations(
        conversations,
        state.qwen,
        data.max_tokens_per_micro_batch,
        state.pad_multiple,
        max_groups=data.micro_batch_size,
    )
