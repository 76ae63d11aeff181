"""Log-probs and gradients equal transformers' in every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dppo_mcore.config import ModelConfig, ParallelConfig
from dppo_mcore.model.config import QwenConfig, load_qwen_config
from tests.model.cases import conversation, pack
from tests.model.conftest import Case
from tests.model.harness import TRAIN_ALL, bf16_logprobs, gradient_orders, layout, parity, training
from tests.model.reference import reference_training
from tests.support.rank_pool import RankPool

LOGPROB_BAR, GRADIENT_BAR = 2e-6, 1e-5
FULL = replace(TRAIN_ALL, recompute_granularity="full")
SELECTIVE = replace(TRAIN_ALL, recompute_granularity="selective")
FROZEN = replace(TRAIN_ALL, freeze_vision=True)
MERGER_ONLY = replace(TRAIN_ALL, freeze_vision=True, freeze_language=True)
TOWER_ONLY = replace(TRAIN_ALL, freeze_merger=True, freeze_language=True)
LANGUAGE_ONLY = replace(TRAIN_ALL, freeze_vision=True, freeze_merger=True)

TWO_RANKS = {
    "dp2": (layout(), TRAIN_ALL),
    "dp2-full-recompute": (layout(), FULL),
    "tp2": (layout(2), TRAIN_ALL),
    "tp2-sp": (layout(2, sp=True), TRAIN_ALL),
    "tp2-sp-full-recompute": (layout(2, sp=True), FULL),
    "tp2-selective-recompute": (layout(2), SELECTIVE),
    "tp2-frozen-vision": (layout(2), FROZEN),
    "tp2-sp-merger-only": (layout(2, sp=True), MERGER_ONLY),
    "tp2-tower-only": (layout(2), TOWER_ONLY),
    "dp2-frozen-vision": (layout(), FROZEN),
    "dp2-language-only": (layout(), LANGUAGE_ONLY),
    "pp2": (layout(1, 2), TRAIN_ALL),
    "pp2-merger-only": (layout(1, 2), MERGER_ONLY),
    "pp2-uneven": (layout(1, 2, num_layers_in_first_pipeline_stage=3), TRAIN_ALL),
    "pp2-vpp2": (layout(1, 2, 2), TRAIN_ALL),
    "pp2-vpp2-uneven": (
        layout(1, 2, 2, num_layers_in_first_pipeline_stage=2, num_layers_in_last_pipeline_stage=6),
        TRAIN_ALL,
    ),
    "pp2-vpp2-full-recompute": (layout(1, 2, 2), FULL),
}
FOUR_RANKS = {
    "pp4": (layout(1, 4), TRAIN_ALL),
    "tp2-pp2-sp": (layout(2, 2, sp=True), TRAIN_ALL),
    "tp2-pp2-vpp2-sp": (layout(2, 2, 2, sp=True), TRAIN_ALL),
    "tp4-sp": (layout(4, sp=True), TRAIN_ALL),
    "tp2-dp2": (layout(2), TRAIN_ALL),
    "pp2-dp2": (layout(1, 2), TRAIN_ALL),
    "pp4-uneven": (
        layout(1, 4, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=3),
        TRAIN_ALL,
    ),
}


def check(pool: RankPool, case: Case, parallel: ParallelConfig, model: ModelConfig, **extra: Any) -> None:
    """Run the case on all ranks and hold every rank's errors against the bars."""
    results = pool.run(parity, case.folder, parallel, model, case.batches, case.oracle, **extra)
    assert sum(result["outputs"] for result in results) >= len(case.batches)
    for result in results:
        assert result["logprob"] <= LOGPROB_BAR, result
        assert result["gradient"] <= GRADIENT_BAR, result


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("model", [TRAIN_ALL, FULL], ids=["plain", "full-recompute"])
def test_one_rank(mixed_case: Case, group_case: Case, model: ModelConfig) -> None:
    for case in (mixed_case, group_case):
        result = parity(case.folder, layout(), model, case.batches, case.oracle)
        assert result["logprob"] <= LOGPROB_BAR and result["gradient"] <= GRADIENT_BAR, result


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(pool2: RankPool, mixed_case: Case, name: str) -> None:
    check(pool2, mixed_case, *TWO_RANKS[name])


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks(pool4: RankPool, mixed_case: Case, name: str) -> None:
    check(pool4, mixed_case, *FOUR_RANKS[name])


@pytest.mark.parametrize("name", ["dp2", "tp2-sp", "pp2", "pp2-vpp2", "pp2-merger-only"])
def test_tied(pool2: RankPool, tied_case: Case, name: str) -> None:
    check(pool2, tied_case, *TWO_RANKS[name])


@pytest.mark.parametrize("name", ["tp4-sp", "tp2-pp2-sp"])
def test_padded_vocabulary(pool4: RankPool, odd_case: Case, name: str) -> None:
    check(pool4, odd_case, *FOUR_RANKS[name])


@pytest.mark.parametrize("name", ["dp2", "tp2-sp", "tp2-selective-recompute", "pp2", "pp2-vpp2-full-recompute"])
def test_shared_prompts(pool2: RankPool, group_case: Case, name: str) -> None:
    check(pool2, group_case, *TWO_RANKS[name])


def test_shared_prompts_on_four_ranks(pool4: RankPool, group_case: Case) -> None:
    check(pool4, group_case, *FOUR_RANKS["tp2-pp2-vpp2-sp"])


@pytest.mark.parametrize("name", ["dp2", "dp2-full-recompute", "dp2-frozen-vision", "tp2"])
def test_ranks_without_media_reduce_in_step(pool2: RankPool, mixed_case: Case, name: str) -> None:
    """With overlapped reduction a parameter without a gradient would leave its bucket waiting, and gradients in
    another order than on a rank with media would have the ranks reduce different buckets with each other."""
    check(pool2, mixed_case, *TWO_RANKS[name], overlap=True, timeout_s=60.0)


@pytest.mark.parametrize("name", ["dp2", "dp2-full-recompute", "dp2-frozen-vision", "tp2", "tp2-tower-only"])
def test_gradients_come_in_one_order(pool2: RankPool, mixed_case: Case, qwen: QwenConfig, name: str) -> None:
    """With media, without, and at TP2 of one frame that another rank encodes."""
    image = pack([conversation(qwen, "image", 21, [((1, 6, 4), None)], [5])], qwen)
    ranks = pool2.run(gradient_orders, mixed_case.folder, *TWO_RANKS[name], [*mixed_case.batches, image])
    orders = [order for rank in ranks for order in rank]
    assert len(orders[0]) > 20 and all(order == orders[0] for order in orders)


@pytest.mark.parametrize("name", ["dp2", "tp2-sp", "pp2-vpp2"])
def test_three_adamw_steps(pool2: RankPool, mixed_case: Case, name: str, tmp_path: Any) -> None:
    check_training(pool2, mixed_case, *TWO_RANKS[name], str(tmp_path / "steps.pt"))


def test_three_adamw_steps_on_four_ranks(pool4: RankPool, tied_case: Case, tmp_path: Any) -> None:
    check_training(pool4, tied_case, *FOUR_RANKS["tp2-pp2-sp"], str(tmp_path / "steps.pt"))


def check_training(pool: RankPool, case: Case, parallel: ParallelConfig, model: ModelConfig, path: str) -> None:
    """Losses within 1e-5 and weights within 1e-4 of transformers with torch's AdamW over three steps."""
    losses, weights = reference_training(case.folder, case.rows, load_qwen_config(case.folder), steps=3)
    torch.save(weights, path)
    for result in pool.run(training, case.folder, parallel, model, case.batches, path, steps=3):
        assert all(abs(a - b) <= 1e-5 for a, b in zip(result["losses"], losses, strict=True)), (result, losses)
        assert result["weight"] <= 1e-4, result


def test_bf16_stays_near_fp32(pool2: RankPool, group_case: Case) -> None:
    """Parameters and activations in bf16, at TP2 with sequence parallelism."""
    expected = torch.load(group_case.oracle)["logprobs"][0]
    for got in pool2.run(bf16_logprobs, group_case.folder, layout(2, sp=True), group_case.batches[0]):
        assert got.dtype is torch.float32
        assert float((got - expected).abs().max()) < 0.1
