"""Whole RL and SFT steps over data-parallel replicas: the same figures, and the same complaint everywhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state

from dppo_mcore.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RlConfig, RunConfig
from dppo_mcore.learn.loss import CrossEntropy
from dppo_mcore.learn.rl import rl_step
from dppo_mcore.learn.sft import pack, sft_step
from dppo_mcore.learn.state import Learner, build
from dppo_mcore.learn.step import BadGradientError, train_step
from dppo_mcore.runtime import parallel
from tests.learn.groups import random_conversations, random_groups
from tests.support.rank_pool import RankPool

PP2 = ParallelConfig(pipeline_model_parallel_size=2)


def make(model: str, layout: ParallelConfig) -> Learner:
    parallel.reinit(layout, seed=0)
    config = Config(
        run=RunConfig(model=model),
        parallel=layout,
        model=ModelConfig(dtype="fp32"),
        optimizer=OptimizerConfig(max_bad_steps=2),
        rl=RlConfig(advantage_scale="batch", updates_per_batch=2, kl_coef=0.05, tis_cap=2.0),
        data=DataConfig(max_tokens_per_micro_batch=200),
    )
    state = build(config)
    state.begin_phase("rl", 1e-4, 10)
    state.keep_reference()
    return state


def both_steps(model: str, layout: ParallelConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of an RL step with an uneven number of groups, and of an SFT step after it."""
    state = make(model, layout)
    groups, conversations = random_groups(state.qwen, 7, 3), random_conversations(state.qwen, 5)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    # Which groups make up which update follows from the deal, so that two replicas deal as one rank does.
    dealt = [groups[i] for i in range(len(groups)) if (i // 2) % size == rank]
    first = rl_step(state, dealt).metrics
    second = sft_step(state, conversations[rank::size]).metrics
    return first, second


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("layout", [ParallelConfig(), PP2], ids=["dp2", "pp2"])
def test_replicas_report_the_same(layout: ParallelConfig, tiny_dir: str, pool2: RankPool) -> None:
    timed = ("time/", "train/tokens_per_s", "train/grad_norm", "rl/loss", "sft/loss")
    expected = both_steps(tiny_dir, ParallelConfig())
    ranks = pool2.run(both_steps, tiny_dir, layout)
    for found in ranks:
        for step, reference in zip(found, expected, strict=True):
            assert step.keys() == reference.keys()
            for name, value in reference.items():
                if not name.startswith(timed) and not name.startswith("rl/kl_old"):
                    assert step[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
    same = [{k: v for k, v in step.items() if not k.startswith("time/") and "per_s" not in k} for step in ranks[0]]
    other = [{k: v for k, v in step.items() if not k.startswith("time/") and "per_s" not in k} for step in ranks[1]]
    assert same == other


def one_bad_replica(model: str, layout: ParallelConfig) -> tuple[list[bool], str]:
    """Steps in which only the last data-parallel rank's clip is broken: applied or not, and the last complaint."""
    state = make(model, layout)
    batches = pack(state, random_conversations(state.qwen, 4))
    if parallel_state.get_data_parallel_rank() == parallel_state.get_data_parallel_world_size() - 1:
        batches = [
            batch if batch.patches_P is None else replace(batch, patches_P=torch.full_like(batch.patches_P, math.nan))
            for batch in batches
        ]
    applied = [train_step(state, batches, CrossEntropy()).applied]
    with pytest.raises(BadGradientError) as complaint:
        train_step(state, batches, CrossEntropy())
    return applied, str(complaint.value)


@pytest.mark.parametrize("layout", [ParallelConfig(), PP2], ids=["dp2", "pp2"])
def test_every_rank_names_the_bad_batch(layout: ParallelConfig, tiny_dir: str, pool2: RankPool) -> None:
    for applied, complaint in pool2.run(one_bad_replica, tiny_dir, layout):
        assert applied == [False]
        assert "q1#0" in complaint and "2 steps in a row" in complaint
