"""RL and SFT steps on one rank: on-policy figures, options, dropped groups, bad gradients, offload, replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_mcore.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RlConfig, RunConfig
from dppo_mcore.learn import replay
from dppo_mcore.learn.advantages import overlong_penalty
from dppo_mcore.learn.loss import CrossEntropy
from dppo_mcore.learn.offload import Offloader
from dppo_mcore.learn.rl import Group, rl_step
from dppo_mcore.learn.schedule import Schedule
from dppo_mcore.learn.sft import pack, sft_step
from dppo_mcore.learn.state import Learner, build
from dppo_mcore.learn.step import BadGradientError, logprobs, train_step
from dppo_mcore.runtime import parallel
from dppo_mcore.runtime.errors import UserError
from dppo_mcore.types import ScoredRollout
from tests.learn.groups import random_conversations, random_groups

Make = Callable[..., Learner]


@pytest.fixture
def learner(tiny_dir: str) -> Iterator[Make]:
    parallel.start(ParallelConfig(), seed=0)

    def make(optimizer: str = "adam", weight_decay: float = 0.0, **rl: Any) -> Learner:
        state = build(
            Config(
                run=RunConfig(model=tiny_dir),
                model=ModelConfig(dtype="fp32"),
                optimizer=OptimizerConfig(optimizer=optimizer, weight_decay=weight_decay),
                rl=RlConfig(**rl),
                data=DataConfig(max_tokens_per_micro_batch=256),
            )
        )
        state.keep_reference()
        return state

    yield make
    parallel.stop()


def weights(state: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for model in state.models for p in model.parameters()]


def with_engine_logprobs(state: Learner, groups: list[Group]) -> list[Group]:
    """The groups as an exact engine would have sampled them: with the present weights' log-probs."""
    from dppo_mcore.learn.rl import pack as pack_groups

    result = []
    for group in groups:
        batches = pack_groups(state, [group], [[0.0] * len(group.answers)])
        values = {
            ref.index: row.tolist()
            for batch, rows in zip(batches, logprobs(state, batches), strict=True)
            for ref, row in zip(batch.sequences, rows.split(batch.cu_rows.diff().tolist()), strict=True)
        }
        answers = [
            replace(a, rollout=replace(a.rollout, logprobs=tuple(values[a.rollout.index]))) for a in group.answers
        ]
        result.append(Group(group.prompt, tuple(answers)))
    return result


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("old", ["trainer", "engine"])
def test_first_update_is_on_policy(learner: Make, updates: int, old: str) -> None:
    state = learner(updates_per_batch=updates, old_logprobs=old, tis_cap=2.0)
    state.begin_phase("rl", 1e-4, 10)
    groups = with_engine_logprobs(state, random_groups(state.qwen, 6, 4))
    result = rl_step(state, groups)
    first = result.updates[0].metrics
    assert len(result.updates) == updates
    assert first["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["tis_weight"] == pytest.approx(1.0, abs=1e-6)
    for name in ("approx_kl", "kl_ref"):
        assert first[name] == pytest.approx(0.0, abs=1e-6)
    assert result.metrics["rl/kl_rollout"] == pytest.approx(0.0, abs=1e-6)
    assert result.metrics["rl/entropy"] > 0
    if updates == 2:
        assert result.updates[1].metrics["ratio"] != 1.0
    assert state.progress.phase_steps == updates


def test_groups_without_signal_change_nothing(learner: Make) -> None:
    state = learner(kl_coef=0.0)
    state.begin_phase("rl", 1e-4, 10)
    groups = random_groups(state.qwen, 5, 4)
    before = weights(state)
    alike = [groups[4], Group(groups[4].prompt, groups[4].answers)]
    result = rl_step(state, alike)
    assert result.updates == () and result.metrics["rl/live_groups"] == 0.0 and result.metrics["rl/all_pass"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state), strict=True))
    with_dead, without = learner(), learner()
    for other in (with_dead, without):
        other.begin_phase("rl", 1e-4, 10)
    rl_step(with_dead, groups)
    rl_step(without, groups[:4])
    assert all(torch.equal(a, b) for a, b in zip(weights(with_dead), weights(without), strict=True))


def emptied(answer: ScoredRollout) -> ScoredRollout:
    """The answer as if it was aborted before its first token."""
    return replace(answer, rollout=replace(answer.rollout, token_ids=(), logprobs=(), finish_reason="abort"))


def test_dropping_keeps_the_constant_normalizer(learner: Make) -> None:
    """Dr.GRPO divides by all sequences: neither groups of zero advantage nor empty answers change the divisor."""
    results = []
    for drop in (True, False):
        state = learner(aggregation="constant", drop_zero_variance=drop, kl_coef=0.0)
        state.begin_phase("rl", 1e-4, 10)
        groups = random_groups(state.qwen, 5, 4)
        groups[0] = replace(groups[0], answers=(emptied(groups[0].answers[0]), *groups[0].answers[1:]))
        results.append(rl_step(state, groups).updates[0])
        assert results[-1].normalizer == 20 * state.config.rollout.max_response_tokens
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-7)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_step_is_the_same_under_every_budget(level: str, learner: Make) -> None:
    """Answers far above a row's tokens, an empty one, a dropped group, two updates, one prompt a row or many."""
    found = []
    for data in (
        DataConfig(max_tokens_per_micro_batch=16),
        DataConfig(max_tokens_per_micro_batch=4096),
        DataConfig(max_tokens_per_micro_batch=4096, micro_batch_size=1, share_prompts=False),
    ):
        state = learner(importance_level=level, aggregation="seq-mean-token-mean", updates_per_batch=2, tis_cap=1.5)
        state.config = replace(state.config, data=data)
        state.begin_phase("rl", 1e-4, 10)
        groups = random_groups(state.qwen, 5, 3, longest=160)
        groups[1] = replace(groups[1], answers=(emptied(groups[1].answers[0]), *groups[1].answers[1:]))
        result = rl_step(state, groups)
        assert len(result.updates) == 2 and max(len(a.rollout.token_ids) for g in groups for a in g.answers) > 100
        found.append(result)
    for other in found[1:]:
        for mine, theirs, tolerance in zip(found[0].updates, other.updates, (1e-6, 1e-4), strict=True):
            assert theirs.normalizer == mine.normalizer
            assert theirs.loss == pytest.approx(mine.loss, abs=tolerance)
            assert theirs.grad_norm == pytest.approx(mine.grad_norm, rel=10 * tolerance)
        assert other.metrics["rl/kl_rollout"] == pytest.approx(found[0].metrics["rl/kl_rollout"], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_weight_decay_spares_norms_and_biases(learner: Make, optimizer: str) -> None:
    """Without a gradient decay is all that a step does: to matrices, as with transformers' and TRL's trainers."""
    state = learner(optimizer, weight_decay=0.5)
    before = weights(state)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    assert state.optimizer.step(0.1, 0.0) == (0.0, True)
    named = [(name, parameter) for model in state.models for name, parameter in model.named_parameters()]
    decayed = []
    for (name, parameter), value in zip(named, before, strict=True):
        decays = parameter.requires_grad and parameter.ndim > 1
        torch.testing.assert_close(parameter.detach(), 0.95 * value if decays else value, msg=name)
        decayed.append(decays)
    assert {True, False} == set(decayed)


def test_overlong_penalty() -> None:
    assert [overlong_penalty(n, 100, 20) for n in (10, 80, 90, 100, 120)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert overlong_penalty(100, 100, 0) == 0.0


def test_schedule_counts_optimizer_steps_of_the_phase(learner: Make) -> None:
    linear = Schedule(1.0, "linear", warmup_steps=2, total_steps=12, min_ratio=0.1)
    assert [round(linear.lr(step), 3) for step in (0, 1, 2, 7, 12, 99)] == [0.333, 0.667, 1.0, 0.55, 0.1, 0.1]
    assert Schedule(1.0, "cosine", 0, 10, 0.0).lr(5) == pytest.approx(0.5)
    state = learner()
    state.config = replace(state.config, optimizer=replace(state.config.optimizer, lr_schedule="linear"))
    state.begin_phase("rl", 1e-4, 4)
    groups = random_groups(state.qwen, 2, 3)
    rates = [rl_step(state, groups).updates[0].lr for _ in range(2)]
    state.begin_phase("sft", 1e-5, 4)
    rates.append(sft_step(state, random_conversations(state.qwen, 3)).update.lr)
    assert rates == pytest.approx([1e-4, 7.75e-5, 1e-5])
    assert (state.progress.phase_steps, state.progress.total_steps) == (1, 3)


def test_a_phase_goes_on_under_present_options(learner: Make) -> None:
    """A resumed phase that is to last longer decays over its new length, from where it stands."""
    state = learner()
    state.config = replace(state.config, optimizer=replace(state.config.optimizer, lr_schedule="linear"))
    state.begin_phase("sft", 1e-4, 4)
    conversations = random_conversations(state.qwen, 2)
    for _ in range(2):
        sft_step(state, conversations)
    saved = state.state_dict()
    state.load_state_dict(saved)
    state.continue_phase(1e-4, 4)
    assert state.state_dict() == saved
    state.continue_phase(1e-4, 20)
    assert state.progress.phase_steps == 2
    assert sft_step(state, conversations).update.lr == pytest.approx(1e-4 * (0.1 + 0.9 * 0.9))


def test_bad_gradients_are_skipped_counted_and_named(learner: Make) -> None:
    state = learner()
    state.config = replace(state.config, optimizer=replace(state.config.optimizer, max_bad_steps=3))
    state.begin_phase("sft", 1e-4, 10)
    good = pack(state, random_conversations(state.qwen, 2))
    before = weights(state)
    bad = replace(good[0], patches_P=torch.full_like(good[0].patches_P, math.nan))
    for expected in (1, 2):
        result = train_step(state, [bad], CrossEntropy())
        assert not result.applied and state.progress.bad_in_a_row == expected
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state), strict=True))
    assert train_step(state, good, CrossEntropy()).applied and state.progress.bad_in_a_row == 0
    with pytest.raises(BadGradientError, match="q1#0"):
        for _ in range(3):
            train_step(state, [bad], CrossEntropy())
    assert state.progress.bad_total == 5


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_offload_is_bitwise_neutral(learner: Make, optimizer: str) -> None:
    finals = []
    for offloads in (False, True):
        state = learner(optimizer)
        state.begin_phase("sft", 1e-3, 10)
        offloader = Offloader(state)
        batches = pack(state, random_conversations(state.qwen, 4))
        for _ in range(3):
            train_step(state, batches, CrossEntropy())
            if offloads:
                stages = offloader.offload()
                assert [stage.name for stage in stages] == ["gradients", "optimizer", "weights", "communicators"]
                assert all(stage.bytes > 0 for stage in stages[:3]) and offloader.offload() == []
                assert all(p.untyped_storage().nbytes() == 0 for m in state.models for p in m.parameters())
                offloader.reload()
        finals.append(weights(state))
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def test_replay_is_bitwise(learner: Make, tmp_path: Path) -> None:
    finals = []
    for mode in ("dump", "replay"):
        state = learner(updates_per_batch=2)
        state.begin_phase("rl", 1e-4, 10)
        for step in range(3):
            if mode == "dump":
                groups = random_groups(state.qwen, 4, 3, seed=step)
                replay.dump(tmp_path, f"1-1 RL/{step}", groups)
            else:
                groups = replay.replay(tmp_path, f"1-1 RL/{step}")
            rl_step(state, groups)
        finals.append(weights(state))
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))
    with pytest.raises(UserError, match="no recorded batch '1-1 RL/7'"):
        replay.replay(tmp_path, "1-1 RL/7")
