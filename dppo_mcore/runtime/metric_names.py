"""Every metric's name and unit, declared once. `*` stands for an objective, a part or a data source."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache

UNITS: dict[str, str] = {
    # RL
    "rl/reward": "mean reward",
    "rl/success": "share of answers",
    "rl/success/*": "share of an objective's samples",
    "rl/loss": "loss",
    "rl/ratio": "mean ratio new/old",
    "rl/clip_fraction_low": "share of tokens",
    "rl/clip_fraction_high": "share of tokens",
    "rl/kl_old": "nats per token",
    "rl/kl_ref": "nats per token",
    "rl/kl_rollout": "nats per token",
    "rl/tis_weight": "mean weight",
    "rl/entropy": "nats per token",
    "rl/advantage_std": "standard deviation",
    "rl/response_tokens": "tokens per answer",
    "rl/truncated": "share of answers",
    "rl/all_pass": "share of groups",
    "rl/all_fail": "share of groups",
    "rl/live_groups": "share of groups",
    "rl/stagnation": "score",
    "rl/stagnation/*": "score of an objective",
    "rl/format": "share of answers in the asked format",
    # SFT
    "sft/loss": "nats per token",
    "sft/loss/*": "nats per token of a source",
    "sft/tokens": "learnt tokens per step",
    # both
    "train/lr": "learning rate",
    "train/grad_norm": "L2 norm",
    "train/skipped_steps": "steps with non-finite gradients",
    "train/tokens_per_s": "tokens per second",
    "train/flops": "floating-point operations of the step, ViT included",
    "train/mfu": "share of the device's peak, ViT included",
    "time/*": "seconds",
    "memory/*": "bytes",
    "rollout/flops": "floating-point operations of generation, a prompt once for its answers, ViT included",
    "rollout/*": "see the name",
    "data/*": "count",
    "sync/*": "see the name",
    "eval/success": "share of held-out samples",
    "eval/success/*": "share of held-out samples of an objective",
    "eval/general": "share of held-out general samples",
    "eval/forgotten": "share of held-out general samples lost since the run's first evaluation",
}


@lru_cache(maxsize=4096)
def unit_of(name: str) -> str:
    """Unit of a declared metric; an undeclared one is an error."""
    for pattern, unit in UNITS.items():
        if name == pattern or fnmatchcase(name, pattern):
            return unit
    raise KeyError(f"metric {name} is not declared in runtime/metric_names.py")
