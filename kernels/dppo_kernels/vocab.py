"""One rank's slice of a vocabulary that is spread over a process group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Columns `start .. start + columns` of a vocabulary of `total`; further rows of the weight are padding."""

    start: int
    columns: int
    total: int
    group: dist.ProcessGroup | None = None

    @property
    def world(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def share(self) -> int:
        """Columns of a rank's even share, in whole 64s as shards are padded: the same number on every rank, where
        `columns` is smaller on those that hold padding."""
        return self.columns if self.group is None else -(-self.total // (64 * self.world)) * 64

    @property
    def first(self) -> int:
        """Smallest id that some rank can own."""
        return self.start if self.group is None else 0

    @staticmethod
    def of(
        weight_VH: Tensor, group: dist.ProcessGroup | None, vocab_start: int | None, vocab_size: int | None
    ) -> VocabShard:
        """Find this rank's slice. Without both numbers, ranks of a group exchange their sizes in a collective."""
        local = weight_VH.shape[0]
        if group is None or dist.get_world_size(group) == 1:
            start = vocab_start or 0
            total = start + local if vocab_size is None else vocab_size
            group = None
        elif vocab_start is None or vocab_size is None:
            mine = torch.tensor([local], dtype=torch.int64, device=weight_VH.device)
            sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
            dist.all_gather(sizes, mine, group=group)
            lengths = torch.cat(sizes).tolist()
            start = sum(lengths[: dist.get_rank(group)]) if vocab_start is None else vocab_start
            total = sum(lengths) if vocab_size is None else vocab_size
        else:
            start, total = vocab_start, vocab_size
        return VocabShard(start, min(max(total - start, 0), local), total, group)

    def gather(self, stats_SC: Tensor) -> Tensor:
        """Statistics of every rank, in rank order: [W, S, C]."""
        if self.group is None or stats_SC.numel() == 0:
            return stats_SC.unsqueeze(0)
        gathered = torch.empty(self.world * stats_SC.numel(), dtype=stats_SC.dtype, device=stats_SC.device)
        dist.all_gather_into_tensor(gathered, stats_SC.contiguous().view(-1), group=self.group)
        return gathered.view(self.world, *stats_SC.shape)

    def check_targets(self, targets_N: Tensor) -> None:
        """On CPU a target that no rank owns is an error; on CUDA its row becomes NaN (a check would stall it)."""
        if targets_N.is_cuda or targets_N.numel() == 0:
            return
        wrong_N = (targets_N >= self.total) | ((targets_N >= 0) & (targets_N < self.first))
        if bool(wrong_N.any()):
            row = int(wrong_N.nonzero()[0])
            raise IndexError(
                f"targets[{row}] = {int(targets_N[row])} lies outside the vocabulary of {self.total} ids: "
                "give an id of the vocabulary, or a negative one to mask the row"
            )
