"""Drawing tokens from a vocabulary that is spread over tensor-parallel ranks.

Noise is a function of (answer's seed, position, token id) alone, so a draw depends neither on its neighbours in the
batch nor on how the vocabulary is split. A token wins when its probability over its own exponential noise is largest
(the exponential race), which is exact sampling and, unlike an inverse CDF, hardly ever flips on rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from dppo_kernels.products import logits_into
from torch import Tensor

from dppo_mcore.rollout.base import Sampling

_GOLDEN = -7046029254386353131
_MIX = (-4658895280553007687, -7723592293110705685)
"""SplitMix64's constants as signed 64-bit integers."""


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, start + weight rows) of the head; ids from `total` on are padding."""

    weight_VH: Tensor
    start: int
    total: int
    group: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        """Ranks the vocabulary is spread over."""
        return 1 if self.group is None else self.group.size()


class Sampler:
    """Draws one token per row under fixed `Sampling`; every rank of the shard's group calls with the same rows."""

    def __init__(self, shard: VocabShard, sampling: Sampling) -> None:
        self._shard, self._sampling = shard, sampling
        columns = shard.weight_VH.shape[0]
        device = shard.weight_VH.device
        ids_V = torch.arange(shard.start, shard.start + columns, device=device)
        forbidden_V = ids_V >= shard.total
        if sampling.banned_token_ids:
            forbidden_V |= torch.isin(ids_V, torch.tensor(sampling.banned_token_ids, device=device))
        self._forbidden = forbidden_V.nonzero().flatten()
        self._truncates = sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1)
        noise_ids = torch.arange(columns * shard.ranks, device=device) if self._truncates else ids_V
        self._noise_V = _mix(noise_ids)

    def draw(self, hidden_BH: Tensor, seeds_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """(token ids int64 [B], log-probs fp32 [B]) of the distribution drawn from.

        `positions_B` counts the answer's tokens so far.
        """
        logits_BV = self._logits(hidden_BH)
        start = self._shard.start
        if self._truncates:
            logits_BV, start = self._truncated(self._gather(logits_BV)), 0
        top_B1 = logits_BV.amax(1, keepdim=True)
        weights_BV = (logits_BV - top_B1).exp_()
        sum_B = weights_BV.sum(1)
        if self._sampling.temperature > 0:
            weights_BV /= _exponential(_mix((seeds_B << 32) | positions_B), self._noise_V)
        best_B, local_B = weights_BV.max(1)
        chosen_B = logits_BV.gather(1, local_B[:, None]).squeeze(1)
        top_B = top_B1.squeeze(1)
        tokens_B = local_B + start
        if self._shard.ranks == 1 or self._truncates:
            return tokens_B, chosen_B - top_B - sum_B.log()
        return self._across_ranks(top_B, sum_B, best_B, chosen_B, tokens_B)

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        """Tempered fp32 logits of this rank's columns, forbidden ones -inf."""
        weight_VH = self._shard.weight_VH
        logits_BV = torch.empty(hidden_BH.shape[0], weight_VH.shape[0], device=hidden_BH.device)
        logits_into(logits_BV, hidden_BH, weight_VH)
        if self._sampling.temperature > 0 and self._sampling.temperature != 1:
            logits_BV /= self._sampling.temperature
        if len(self._forbidden):
            logits_BV.index_fill_(1, self._forbidden, float("-inf"))
        return logits_BV

    def _across_ranks(
        self, top: Tensor, total: Tensor, best: Tensor, chosen: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best of all ranks' candidates; one gather of five numbers per row."""
        # A shard that holds only padding has top -inf: it takes no part.
        empty = top == float("-inf")
        total, best = total.masked_fill(empty, 0.0), best.masked_fill(empty, 0.0)
        own = torch.stack([top.double(), total.double(), best.double(), chosen.double(), tokens.double()])
        gathered = torch.empty(self._shard.ranks, *own.shape, dtype=own.dtype, device=own.device)
        dist.all_gather_into_tensor(gathered.view(-1, own.shape[1]), own, group=self._shard.group)
        tops, totals, bests, chosens, ids = gathered.unbind(1)
        top = tops.amax(0)
        scale = (tops - top).exp()
        winner = (bests * scale).argmax(0, keepdim=True)
        logprob = chosens.gather(0, winner).squeeze(0) - top - (totals * scale).sum(0).log()
        return ids.gather(0, winner).squeeze(0).long(), logprob.float()

    def _gather(self, logits_BV: Tensor) -> Tensor:
        """All columns, in id order."""
        if self._shard.ranks == 1:
            return logits_BV
        shards = torch.empty(self._shard.ranks, *logits_BV.shape, device=logits_BV.device)
        dist.all_gather_into_tensor(shards.view(-1, logits_BV.shape[1]), logits_BV, group=self._shard.group)
        return shards.transpose(0, 1).reshape(logits_BV.shape[0], -1)

    def _truncated(self, logits_BV: Tensor) -> Tensor:
        """-inf outside the top-k and then, of what is left renormalised, outside the nucleus.

        The nucleus keeps the token with which the sum reaches top_p. Ties at an edge go to the smaller id.
        """
        sorted_BV, order_BV = logits_BV.sort(dim=1, descending=True, stable=True)
        if self._sampling.top_k > 0:
            sorted_BV[:, self._sampling.top_k :] = float("-inf")
        if self._sampling.top_p < 1:
            probs_BV = sorted_BV.softmax(1)
            before_BV = probs_BV.cumsum(1) - probs_BV
            outside_BV = before_BV >= self._sampling.top_p
            outside_BV[:, 0] = False
            sorted_BV.masked_fill_(outside_BV, float("-inf"))
        return torch.empty_like(logits_BV).scatter_(1, order_BV, sorted_BV)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser of int64 counters."""
    x = (x + 1) * _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _exponential(rows_B: Tensor, columns_V: Tensor) -> Tensor:
    """Exponential noise [B, V], fp32, a function of the two hashes; fine-grained near zero, where races are won."""
    x_BV = rows_B[:, None] ^ columns_V
    x_BV *= _MIX[0]
    x_BV ^= x_BV >> 32
    x_BV *= _MIX[1]
    uniform_BV = ((x_BV >> 11) & ((1 << 53) - 1)).float().mul_(2.0**-53).add_(2.0**-60)
    return uniform_BV.neg_().log1p_().neg_()
