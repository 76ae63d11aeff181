"""What a step minimises: the policy loss and cross-entropy behind one small protocol.

R loss rows of a micro-batch, H hidden size, V this rank's vocabulary shard.
Every statistic is a pair [sum, count], so that micro-batches and ranks add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from dppo_kernels import SumCount, linear_logprob, linear_policy_loss, policy_loss
from dppo_kernels.policy_loss import MAX_LOG_RATIO
from torch import Tensor

from dppo_mcore.config import RlConfig
from dppo_mcore.types import PackedBatch

Statistics = dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """The vocabulary projection of the last stage and where its shard lies."""

    weight_VH: Tensor
    group: torch.distributed.ProcessGroup | None
    vocab_start: int
    vocab_size: int

    def arguments(self) -> dict[str, Any]:
        """The kernels' keyword arguments."""
        return {"group": self.group, "vocab_start": self.vocab_start, "vocab_size": self.vocab_size}


class Loss(Protocol):
    """A loss over packed micro-batches that is normalised once, globally."""

    def count(self, batch: PackedBatch) -> float:
        """This micro-batch's share of the global normaliser."""
        ...

    def extra_count(self) -> float:
        """This rank's share of the normaliser that lies in no micro-batch."""
        ...

    def __call__(
        self, hidden_RH: Tensor, head: Head, batch: PackedBatch, normalizer: float
    ) -> tuple[Tensor, Statistics]:
        """Contribution to the global loss, and statistics."""
        ...


def pair(total: Tensor, count: Tensor | float) -> Tensor:
    """A [sum, count] statistic in float64, which keeps token sums exact over a large batch."""
    values = (total.detach(), torch.as_tensor(count, device=total.device).detach())
    return torch.stack([value.double() for value in values])


def non_empty_sequences(batch: PackedBatch) -> int:
    """Sequences of the micro-batch that have loss rows."""
    return int((batch.cu_rows.diff() > 0).sum())


@dataclass(frozen=True)
class PolicyLoss:
    """GRPO and its variants over `advantages`, `old_logprobs`, `ref_logprobs` and `rollout_logprobs` columns."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl: str = "k3"
    tis_cap: float | None = None
    level: str = "token"
    aggregation: str = "token-mean"
    temperature: float = 1.0
    constant: float = 1.0
    """Dr.GRPO's tokens per sequence, with aggregation `constant`."""
    dropped: float = 0.0
    """Sequences without a signal or a token, left out of the batch, which `constant` counts all the same."""

    @classmethod
    def of(cls, rl: RlConfig, temperature: float, max_response_tokens: int) -> PolicyLoss:
        """The configured loss."""
        return cls(
            clip_low=rl.clip_low,
            clip_high=rl.clip_high,
            dual_clip=rl.dual_clip,
            kl_coef=rl.kl_coef,
            kl=rl.kl,
            tis_cap=rl.tis_cap,
            level=rl.importance_level,
            aggregation=rl.aggregation,
            temperature=temperature,
            constant=float(max_response_tokens),
        )

    def count(self, batch: PackedBatch) -> float:
        """Tokens, sequences, or sequences times the constant."""
        if self.aggregation == "token-mean":
            return float(batch.targets_R.numel())
        if self.aggregation == "constant":
            return len(batch.sequences) * self.constant
        return float(non_empty_sequences(batch))

    def extra_count(self) -> float:
        """Dr.GRPO divides by all sequences of the batch."""
        return self.dropped * self.constant if self.aggregation == "constant" else 0.0

    def __call__(
        self, hidden_RH: Tensor, head: Head, batch: PackedBatch, normalizer: float
    ) -> tuple[Tensor, Statistics]:
        """Policy loss of the rows. Without an `old_logprobs` column the current ones serve: one on-policy update."""
        columns = batch.columns
        rollout_R = columns.get("rollout_logprobs")
        options: dict[str, Any] = {
            "ref_logprobs": columns.get("ref_logprobs") if self.kl_coef else None,
            "rollout_logprobs": rollout_R,
            "clip_low": self.clip_low,
            "clip_high": self.clip_high,
            "dual_clip": self.dual_clip,
            "kl_coef": self.kl_coef,
            "kl": self.kl,
            "tis_cap": self.tis_cap,
            "level": self.level,
            "cu_seqlens": batch.cu_rows,
            "aggregation": self.aggregation,
            "normalizer": normalizer,
        }
        mask_R = torch.ones_like(batch.targets_R, dtype=torch.bool)
        advantages_R, old_R = columns["advantages"], columns.get("old_logprobs")
        at_head = head.arguments() | {"temperature": self.temperature, "valid_count": batch.targets_R.numel()}
        if old_R is None:
            logprob_R, entropy_R = linear_logprob(hidden_RH, head.weight_VH, batch.targets_R, entropy=True, **at_head)
            old_R = logprob_R.detach()
            loss, metrics = policy_loss(logprob_R, old_R, advantages_R, mask_R, **options)
            metrics["entropy"] = SumCount(entropy_R.detach().sum(), metrics["ratio"].count)
        else:
            loss, metrics = linear_policy_loss(
                hidden_RH,
                head.weight_VH,
                batch.targets_R,
                old_R,
                advantages_R,
                mask_R,
                upstream=1.0,
                **at_head,
                **options,
            )
        statistics = {name: pair(*metric) for name, metric in metrics.items()}
        if rollout_R is not None:
            log_ratio_R = (old_R - rollout_R).double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            statistics["kl_rollout"] = pair((log_ratio_R.expm1() - log_ratio_R).sum(), log_ratio_R.numel())
        return loss, statistics


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood per token of the global batch, reported per source."""

    def count(self, batch: PackedBatch) -> float:
        """Learnt tokens."""
        return float(batch.targets_R.numel())

    def extra_count(self) -> float:
        """Nothing beside the micro-batches."""
        return 0.0

    def __call__(
        self, hidden_RH: Tensor, head: Head, batch: PackedBatch, normalizer: float
    ) -> tuple[Tensor, Statistics]:
        """Cross-entropy of the rows over the global token count."""
        logprob_R, _ = linear_logprob(
            hidden_RH, head.weight_VH, batch.targets_R, valid_count=batch.targets_R.numel(), **head.arguments()
        )
        statistics = {"nll": pair(-logprob_R.sum(), logprob_R.numel())}
        bounds = batch.cu_rows.tolist()
        values_R = -logprob_R.detach()
        for sequence, start, end in zip(batch.sequences, bounds[:-1], bounds[1:], strict=True):
            if sequence.source and end > start:
                name = f"nll/{sequence.source}"
                entry = pair(values_R[start:end].sum(), end - start)
                statistics[name] = statistics[name] + entry if name in statistics else entry
        return -logprob_R.sum() / normalizer, statistics
