"""The sampler draws from the distribution it names, whatever the split of the vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dppo_mcore.rollout.base import Sampling
from dppo_mcore.rollout.sampler import Sampler, VocabShard


def logits_head(logits: list[float]) -> torch.Tensor:
    """A head [V, 1] whose logits for the hidden state 1 are these."""
    return torch.tensor(logits)[:, None]


def draw(
    head: torch.Tensor, sampling: Sampling, rows: int, total: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    sampler = Sampler(VocabShard(head, 0, total or head.shape[0]), sampling)
    seeds = torch.arange(rows) // 50
    return sampler.draw(torch.ones(rows, 1), seeds, torch.arange(rows) % 50)


def expected_probs(logits: torch.Tensor, kept: list[int], temperature: float) -> torch.Tensor:
    probs = torch.full_like(logits, float("-inf"))
    probs[kept] = logits[kept] / temperature
    return probs.softmax(0)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Sampling(temperature=0.6), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Sampling(banned_token_ids=(1, 6)), [0, 2, 3, 4, 5, 7]),
        (Sampling(top_k=3), [0, 1, 2]),
        (Sampling(top_p=0.8), [0, 1, 2, 3]),
        (Sampling(top_k=4, top_p=0.8), [0, 1, 2]),
    ],
)
def test_frequencies_follow_the_probabilities(sampling: Sampling, kept: list[int]) -> None:
    """Probabilities 0.4, 0.2, 0.15, 0.1, ... so that the nuclei can be read off by hand."""
    probs = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01])
    logits = probs.log() + 3
    rows = 40_000
    tokens, logprobs = draw(torch.cat([logits[:, None], torch.full((2, 1), 99.0)]), sampling, rows, total=8)
    expected = expected_probs(logits, kept, sampling.temperature)
    counts = torch.bincount(tokens, minlength=8)
    assert counts[[v for v in range(8) if v not in kept]].sum() == 0
    deviation = (counts - rows * expected)[kept] ** 2 / (rows * expected[kept])
    # Chi-square with k - 1 degrees of freedom lies below k + 6 * sqrt(2k) but once in many thousand runs.
    assert deviation.sum() < len(kept) + 6 * math.sqrt(2 * len(kept))
    assert torch.allclose(logprobs, expected.log()[tokens], atol=1e-6)


def test_draws_of_neighbouring_seeds_positions_and_tokens_are_independent() -> None:
    sampler = Sampler(VocabShard(torch.zeros(64, 1), 0, 64), Sampling())
    seeds, steps = torch.meshgrid(torch.arange(200), torch.arange(100), indexing="ij")
    tokens, _ = sampler.draw(torch.ones(20_000, 1), seeds.flatten(), steps.flatten())
    grid = tokens.view(200, 100)
    for first, second in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        joint = torch.bincount((first * 64 + second).flatten(), minlength=4096).float()
        chi = ((joint - joint.mean()) ** 2 / joint.mean()).sum()
        assert abs(chi - 4095) < 6 * math.sqrt(2 * 4095)
    same = (grid[1:] == grid[:-1]).float().mean()
    assert abs(same - 1 / 64) < 0.01


def test_greedy_takes_the_largest_and_reports_it_at_temperature_one() -> None:
    logits = [0.5, 2.0, -1.0, 1.9]
    tokens, logprobs = draw(logits_head(logits), Sampling(temperature=0.0), 3)
    assert tokens.tolist() == [1, 1, 1]
    assert torch.allclose(logprobs, torch.tensor(logits).log_softmax(0)[1].expand(3))
    tokens, logprobs = draw(logits_head(logits), Sampling(temperature=0.0, top_k=1, banned_token_ids=(1,)), 1)
    assert tokens.tolist() == [3]
    assert logprobs.item() == pytest.approx(torch.tensor([0.5, -1.0, 1.9]).log_softmax(0)[2].item(), abs=1e-6)


def test_rare_tokens_are_drawn_at_their_rate() -> None:
    """Fine noise near zero: 1000 tokens of probability 1e-5 each come up together in one draw of a hundred."""
    probs = torch.cat([torch.tensor([0.99]), torch.full((1000,), 1e-5)])
    tokens, _ = draw(probs.log()[:, None], Sampling(), 10_000)
    rare = int((tokens > 0).sum())
    assert abs(rare - 100) < 5 * math.sqrt(100)


def draw_on_shards(sampling: Sampling, columns: int, total: int) -> tuple[list[int], list[float]]:
    """What one of the tensor-parallel ranks draws from its shard of a random head."""
    from megatron.core import parallel_state

    from dppo_mcore.config import ParallelConfig
    from dppo_mcore.runtime import parallel

    world = torch.distributed.get_world_size()
    parallel.reinit(ParallelConfig(tensor_model_parallel_size=world), seed=0)
    head, hidden = random_head(columns * world)
    group = parallel_state.get_tensor_model_parallel_group()
    start = group.rank() * columns
    sampler = Sampler(VocabShard(head[start : start + columns], start, total, group), sampling)
    tokens, logprobs = sampler.draw(hidden, torch.arange(len(hidden)), torch.zeros(len(hidden), dtype=torch.int64))
    return tokens.tolist(), logprobs.tolist()


def random_head(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(columns, 16, generator=generator), torch.randn(500, 16, generator=generator)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.9, banned_token_ids=(3, 150)),
        Sampling(top_k=20, top_p=0.7),
        Sampling(temperature=0.0),
    ],
)
def test_shards_draw_what_the_whole_vocabulary_draws(pool4: Any, sampling: Sampling) -> None:
    """The last rank holds only padding."""
    ranks = pool4.run(draw_on_shards, sampling, 64, 190)
    head, hidden = random_head(256)
    sampler = Sampler(VocabShard(head, 0, 190), sampling)
    tokens, logprobs = sampler.draw(hidden, torch.arange(500), torch.zeros(500, dtype=torch.int64))
    for got_tokens, got_logprobs in ranks:
        assert got_tokens == tokens.tolist()
        assert got_logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)
    assert tokens.max() < 190
