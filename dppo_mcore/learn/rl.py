"""One RL step: rewards of answer groups become advantages, advantages become optimizer steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dppo_mcore.data.packing import pack_groups
from dppo_mcore.learn import statistics
from dppo_mcore.learn.advantages import group_advantages, has_signal, overlong_penalty
from dppo_mcore.learn.loss import PolicyLoss
from dppo_mcore.learn.rl_metrics import group_totals, spread, step_metrics, update_metrics
from dppo_mcore.learn.state import Learner
from dppo_mcore.learn.step import StepResult, logprobs, train_step
from dppo_mcore.types import PackedBatch, Prompt, ScoredRollout


@dataclass(frozen=True)
class Group:
    """A prompt and its scored answers."""

    prompt: Prompt
    answers: tuple[ScoredRollout, ...]


@dataclass(frozen=True)
class RlResult:
    """What an RL step did, equal on every rank."""

    updates: tuple[StepResult, ...]
    """One per optimizer step; empty when no group had a signal anywhere."""
    metrics: dict[str, float]
    """Under their logged names."""


def rl_step(state: Learner, groups: Sequence[Group]) -> RlResult:
    """GRPO on this data-parallel rank's groups, in `updates_per_batch` optimizer steps.

    Old and reference log-probs are those of the weights before the first update.
    """
    rl, rollout = state.config.rl, state.config.rollout
    rewards = [
        [
            answer.reward
            + overlong_penalty(len(answer.rollout.token_ids), rollout.max_response_tokens, rl.overlong_penalty_tokens)
            for answer in group.answers
        ]
        for group in groups
    ]
    advantages = group_advantages(rewards, rl.advantage_scale)
    totals = statistics.reduce_data_parallel(group_totals([g.answers for g in groups], rewards, advantages))
    kept = [i for i, reward in enumerate(rewards) if not rl.drop_zero_variance or has_signal(reward)]
    learnt = sum(bool(answer.rollout.token_ids) for i in kept for answer in groups[i].answers)
    dropped = sum(len(group.answers) for group in groups) - learnt
    shares = [kept[update :: rl.updates_per_batch] for update in range(rl.updates_per_batch)]
    updates = [pack(state, [groups[i] for i in share], [advantages[i] for i in share]) for share in shares]
    began = time.perf_counter()
    updates, passes = _with_logprobs(state, updates)
    seconds = time.perf_counter() - began
    loss = PolicyLoss.of(rl, rollout.temperature, rollout.max_response_tokens)
    loss = replace(loss, dropped=dropped / rl.updates_per_batch)
    results = [
        train_step(state, batches, loss)
        for batches in updates
        if statistics.sum_over_data_parallel(float(len(batches)))
    ]
    metrics = spread(statistics.means(totals)) | update_metrics(results, engine_is_old=rl.old_logprobs == "engine")
    if results:
        # A forward pass is about a third of what the updates counted.
        extra = passes * sum(result.flops for result in results) / 3
        metrics |= step_metrics(results, state.config.model.dtype, extra, seconds) | {"time/logprobs": seconds}
    return RlResult(tuple(results), metrics)


def pack(state: Learner, groups: Sequence[Group], advantages: Sequence[Sequence[float]]) -> list[PackedBatch]:
    """Micro-batches of these groups with their `advantages` and `rollout_logprobs` columns.

    An answer without tokens (aborted before its first) has nothing to learn and is left out.
    """
    data = state.config.data
    rows = [
        [
            (answer.rollout, value)
            for answer, value in zip(group.answers, values, strict=True)
            if answer.rollout.token_ids
        ]
        for group, values in zip(groups, advantages, strict=True)
    ]
    return pack_groups(
        [group.prompt for group in groups],
        [[rollout.token_ids for rollout, _ in row] for row in rows],
        {
            "advantages": [[value for _, value in row] for row in rows],
            "rollout_logprobs": [[rollout.logprobs for rollout, _ in row] for row in rows],
        },
        state.qwen,
        data.max_tokens_per_micro_batch,
        data.share_prompts,
        state.pad_multiple,
        indices=[[rollout.index for rollout, _ in row] for row in rows],
        max_groups=data.micro_batch_size,
    )


def _with_logprobs(state: Learner, updates: list[list[PackedBatch]]) -> tuple[list[list[PackedBatch]], int]:
    """Adds the old and reference log-prob columns that the configuration needs; also how many passes that took.

    A single update on fresh answers needs no old ones: they are the current ones, and the loss takes them so.
    """
    rl, temperature = state.config.rl, state.config.rollout.temperature
    flat = [batch for batches in updates for batch in batches]
    columns: list[dict[str, Tensor]] = [dict(batch.columns) for batch in flat]
    passes = 0
    if rl.old_logprobs == "engine":
        for entry in columns:
            entry["old_logprobs"] = entry["rollout_logprobs"]
    elif rl.updates_per_batch > 1:
        for entry, old_R in zip(columns, logprobs(state, flat, temperature), strict=True):
            entry["old_logprobs"] = old_R
        passes += 1
    if rl.kl_coef:
        if state.reference is None:
            raise ValueError(f"kl_coef {rl.kl_coef}: no reference policy; call keep_reference() where the loop starts")
        with state.reference.in_place():
            for entry, reference_R in zip(columns, logprobs(state, flat, temperature), strict=True):
                entry["ref_logprobs"] = reference_R
        passes += 1
    finished = iter([replace(batch, columns=entry) for batch, entry in zip(flat, columns, strict=True)])
    return [[next(finished) for _ in batches] for batches in updates], passes
