"""What people look at when a policy goes wrong: rewards, lengths, groups, and how far engine and trainer lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from dppo_mcore.learn.statistics import Totals
from dppo_mcore.learn.step import StepResult
from dppo_mcore.runtime import device
from dppo_mcore.types import ScoredRollout


def group_totals(
    answers: Sequence[Sequence[ScoredRollout]],
    rewards: Sequence[Sequence[float]],
    advantages: Sequence[Sequence[float]],
) -> Totals:
    """[sum, count] per metric over this rank's groups."""
    totals: Totals = {}

    def add(name: str, values: Sequence[float]) -> None:
        totals[name] = (float(sum(values)), float(len(values)))

    flat = [answer for group in answers for answer in group]
    passed = [sum(answer.success for answer in group) / max(1, len(group)) for group in answers]
    add("rl/reward", [reward for group in rewards for reward in group])
    add("rl/success", [float(answer.success) for answer in flat])
    add("rl/response_tokens", [float(len(answer.rollout.token_ids)) for answer in flat])
    add("rl/truncated", [float(answer.rollout.finish_reason == "length") for answer in flat])
    add("rl/all_pass", [float(share == 1.0) for share in passed])
    add("rl/all_fail", [float(share == 0.0) for share in passed])
    add("rl/live_groups", [float(any(r != group[0] for r in group)) for group in rewards])
    add("advantage", [value for group in advantages for value in group])
    add("advantage_square", [value * value for group in advantages for value in group])
    formats = [answer.parts["format"] for answer in flat if "format" in answer.parts]
    if formats:
        add("rl/format", formats)
    return totals


def spread(metrics: dict[str, float]) -> dict[str, float]:
    """The advantages' standard deviation in place of their moments."""
    mean, square = metrics.pop("advantage", 0.0), metrics.pop("advantage_square", 0.0)
    return metrics | {"rl/advantage_std": max(0.0, square - mean * mean) ** 0.5}


LOSS_METRICS = {
    "ratio": "rl/ratio",
    "approx_kl": "rl/kl_old",
    "clip_fraction_low": "rl/clip_fraction_low",
    "clip_fraction_high": "rl/clip_fraction_high",
    "kl_ref": "rl/kl_ref",
    "kl_rollout": "rl/kl_rollout",
    "tis_weight": "rl/tis_weight",
    "entropy": "rl/entropy",
}


def update_metrics(updates: Sequence[StepResult], engine_is_old: bool) -> dict[str, float]:
    """The updates' figures under their logged names: means over updates, sums for counts.

    KL(engine || trainer) is by k3 over the sampled tokens. Where the engine's log-probs serve as old ones, it is the
    first update's distance to them.
    """
    if not updates:
        return {}
    metrics = {"rl/loss": _mean([update.loss for update in updates])}
    for name, logged in LOSS_METRICS.items():
        values = [update.metrics[name] for update in updates if name in update.metrics]
        if values:
            metrics[logged] = _mean(values)
    if engine_is_old and "approx_kl" in updates[0].metrics:
        metrics["rl/kl_rollout"] = updates[0].metrics["approx_kl"]
    return metrics


def step_metrics(
    updates: Sequence[StepResult], dtype: str, extra_flops: float = 0.0, extra_seconds: float = 0.0
) -> dict[str, float]:
    """What RL and SFT steps have in common; `extra_*` is work beside the updates (log-prob passes)."""
    seconds = sum(update.seconds for update in updates) + extra_seconds
    metrics = {
        "train/lr": updates[-1].lr,
        "train/grad_norm": _mean([update.grad_norm for update in updates]),
        "train/skipped_steps": float(sum(not update.applied for update in updates)),
        "train/tokens_per_s": sum(update.tokens for update in updates) / seconds,
        "time/train": seconds,
    }
    flops = sum(update.flops for update in updates) + extra_flops
    metrics["train/flops"] = flops
    peak = device.peak_flops(torch.bfloat16 if dtype == "bf16" else torch.float32)
    if peak is not None:
        metrics["train/mfu"] = flops / (seconds * peak * dist.get_world_size())
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
