"""Kept embeddings: tensor-parallel ranks encode together, whatever each of them has kept."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dppo_mcore.config import ParallelConfig
from dppo_mcore.rollout.media import Encoder
from dppo_mcore.runtime import parallel
from dppo_mcore.types import FramePlan, Prompt, PromptMedia, Sample
from tests.support.rank_pool import RankPool


class Tower(nn.Module):
    """Gathers over the tensor-parallel ranks, as the real one does, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(1, 1)
        self.encoded = 0

    def encode_media(self, patches_P: Tensor, grids: Any) -> Tensor:
        from megatron.core import parallel_state

        self.encoded += 1
        summed = patches_P.clone()
        torch.distributed.all_reduce(summed, group=parallel_state.get_tensor_model_parallel_group())
        return summed


def encode_by_decodes() -> tuple[int, list[float]]:
    """The same clip three times, which rank 1 decodes to other pixels at first."""
    parallel.reinit(ParallelConfig(tensor_model_parallel_size=2), seed=0)
    rank, tower = torch.distributed.get_rank(), Tower()
    encoder = Encoder([tower], cast(Any, None), 1 << 20)
    plan = FramePlan("clip.mp4", "video", (0, 1), (0.0, 1.0), (28, 28), (1, 2, 2), 1.0)
    sums = []
    for turn in range(3):
        patches = torch.full((4, 2), 1.0 + (0.5 if rank == 1 and turn == 0 else 0.0))
        prompt = Prompt(Sample("s", "exact", ()), (1,), (PromptMedia(plan, patches),))
        found = encoder.embeddings(prompt)
        assert found is not None
        sums.append(float(found[0, 0]))
    return tower.encoded, sums


def test_ranks_encode_together_or_not_at_all(pool2: RankPool) -> None:
    """Rank 0 has the clip already when rank 1 first sees the same pixels: alone, it would gather with nobody."""
    assert pool2.run(encode_by_decodes) == [(2, [2.5, 2.0, 2.0])] * 2
