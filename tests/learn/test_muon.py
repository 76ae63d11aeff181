"""Muon: against its plain definition, and the same update under every layout."""

from __future__ import annotations

import math

import pytest
import torch

from dppo_mcore.config import ParallelConfig
from dppo_mcore.learn.layerwise import deal
from dppo_mcore.learn.loss import CrossEntropy
from dppo_mcore.learn.orthogonal import Layout, orthogonalise, orthogonalise_all
from dppo_mcore.learn.state import build
from dppo_mcore.learn.step import train_step
from dppo_mcore.model.weights import iter_hf_weights
from dppo_mcore.runtime import parallel
from tests.learn.batches import random_questions
from tests.learn.exact import config, cut
from tests.support.rank_pool import RankPool

LAYOUTS = {
    "dp2": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "tp2_pp2_sp": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    "dp2_tp2": ParallelConfig(tensor_model_parallel_size=2),
}


def plain(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as it is written down, one matrix, fp64."""
    x = matrix.double()
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def test_orthogonalise_is_its_definition() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (16, 16), (8, 24), (1, 5)]
    matrices = [torch.randn(shape, generator=random) for shape in shapes]
    for matrix, result in zip(matrices, orthogonalise_all(matrices), strict=True):
        torch.testing.assert_close(result.double(), plain(matrix), atol=2e-5, rtol=0)
        values = torch.linalg.svdvals(result)
        assert values.max() < 1.3 and values.mean() > 0.5
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_fused_weights_fall_apart_and_come_together() -> None:
    groups, per_group, size, columns = 4, 2, 3, 5
    heads = [torch.randn(groups, share * size, columns) for share in (per_group, 1, 1)]
    fused = torch.cat(heads, dim=1).reshape(-1, columns)
    layout = Layout(0, (per_group, 1, 1), groups)
    for found, expected in zip(layout.matrices(fused), heads, strict=True):
        assert torch.equal(found, expected.reshape(-1, columns))
    assert torch.equal(layout.fuse(layout.matrices(fused)), fused)
    gate, up = torch.randn(8, columns), torch.randn(8, columns)
    shards = [torch.cat([gate[4 * r : 4 * r + 4], up[4 * r : 4 * r + 4]]) for r in range(2)]
    layout = Layout(0, (1, 1), 2)
    whole = layout.join(shards)
    assert all(torch.equal(a, b) for a, b in zip(layout.matrices(whole), (gate, up), strict=True))
    assert torch.equal(layout.cut(layout.fuse([gate, up]), 2, 1), shards[1])


def test_deal_balances() -> None:
    costs = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0]
    owners = deal(costs, 3)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
    assert loads == [10.0, 10.0, 10.0]


def three_steps(model: str, layout: ParallelConfig) -> tuple[list[float], dict[str, torch.Tensor]] | None:
    """Losses and final weights of three Muon steps, clipped and decayed."""
    from dataclasses import replace

    parallel.reinit(layout, seed=0)
    options = config(model, layout, "muon")
    options = replace(options, optimizer=replace(options.optimizer, clip_grad=0.5, weight_decay=0.1))
    state = build(options)
    state.begin_phase("sft", 2e-3, 10)
    losses = [
        train_step(state, cut(random_questions(state.qwen, 6, 2, seed=s % 2), "packed", state), CrossEntropy()).loss
        for s in range(3)
    ]
    weights = {name: tensor.clone() for name, tensor in iter_hf_weights(state.models, state.qwen)}
    return (losses, weights) if torch.distributed.get_rank() == 0 else None


@pytest.mark.usefixtures("single_rank")
def test_every_layout_makes_the_same_steps(tiny_dir: str, pool2: RankPool, pool4: RankPool) -> None:
    expected = three_steps(tiny_dir, ParallelConfig())
    assert expected is not None and expected[0][2] < expected[0][0]
    for name, layout in LAYOUTS.items():
        pool = pool4 if name in ("tp2_pp2_sp", "dp2_tp2") else pool2
        losses, weights = pool.run(three_steps, tiny_dir, layout)[0]
        assert losses == pytest.approx(expected[0], abs=5e-5), name
        worst = max(float((weights[key] - tensor).abs().max()) for key, tensor in expected[1].items())
        assert worst < 1e-4, (name, worst)


@pytest.mark.usefixtures("single_rank")
def test_first_update_is_momentum_free(tiny_dir: str) -> None:
    """Of a zero momentum the first update is the orthogonalised gradient, scaled to an AdamW update's size."""
    state = build(config(tiny_dir, ParallelConfig(), "muon"))
    state.begin_phase("sft", 1e-3, 10)
    weight = dict(state.models[0].named_parameters())["language.decoder.layers.3.mlp.linear_fc2.weight"]
    before = weight.detach().clone()
    train_step(state, cut(random_questions(state.qwen, 4, 2), "packed", state), CrossEntropy())
    update = plain(weight.main_grad) * 0.2 * math.sqrt(max(weight.shape))
    torch.testing.assert_close((before - weight.detach()).double() / 1e-3, update, atol=2e-3, rtol=0)
