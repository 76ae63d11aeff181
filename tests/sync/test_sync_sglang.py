"""Megatron at TP2 x PP2 to the real SGLang: every transport, then the same log-probs; media seen, and seen alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_mcore.config import Config
from dppo_mcore.model.config import load_qwen_config
from dppo_mcore.types import Prompt, PromptMedia
from tests.rollout import cases
from tests.support.rank_pool import RankPool
from tests.support.sglang_server import shim_path
from tests.sync import jobs

pytestmark = pytest.mark.sglang
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def running(pool: RankPool, config: Config) -> Iterator[RankPool]:
    """Four ranks with a learner trained three steps, and an engine."""
    pool.run(jobs.build, config, shim_path())
    pool.run(jobs.train, 3)
    pool.run(jobs.start, config, timeout_s=900)
    yield pool
    pool.run(jobs.stop)


@pytest.fixture(scope="module")
def ranks(pool4: RankPool, tiny_dir: str, sglang_python: str, tmp_path_factory: Any) -> Iterator[RankPool]:
    """The engine at TP 1."""
    run = str(tmp_path_factory.mktemp("run"))
    yield from running(pool4, cases.config(tiny_dir, run, sglang_python, **LAYOUT))


@pytest.fixture(scope="module")
def ranks_tp2(pool4: RankPool, tiny_dir: str, sglang_python: str, tmp_path_factory: Any) -> Iterator[RankPool]:
    """The engine at TP 2, beside the trainer's ranks."""
    run = str(tmp_path_factory.mktemp("run2"))
    options = {"rollout_tensor_parallel_size": 2, "rollout_placement": "disjoint"}
    yield from running(pool4, cases.config(tiny_dir, run, sglang_python, **options, **LAYOUT))


def figures(found: dict[str, Any]) -> str:
    """Largest and mean differences, for the record of a run (`pytest -rP`)."""
    return "{tokens} tokens: max sampled {sampled:.2e}, max scored {scored:.2e}, mean {mean:.2e}".format_map(found)


def check_transport(pool: RankPool, prompts: list[Prompt], transport: str, tolerance: float) -> None:
    """Other weights, one push, fingerprints equal (or push fails), same log-probs on every rank."""
    pool.run(jobs.disturb, len(transport))
    reports = pool.run(jobs.push, transport, bucket_bytes=256 << 10)
    assert reports[0]["buckets"] > 4
    assert reports[0]["peak"] <= 2 * (256 << 10) + reports[0]["largest"]
    found = pool.run(jobs.compare, prompts)
    print(figures(found[0]))
    assert all(one["ids"] == found[0]["ids"] for one in found)
    assert found[0]["greedy"] == found[0]["ids"], "greedy ids differ from the embedded engine's"
    assert found[0]["sampled"] <= tolerance
    assert found[0]["scored"] <= tolerance
    assert {versions[0][0] for versions in found[0]["versions"]} == {found[0]["version"]}


@pytest.mark.parametrize("transport", ["ipc", "distributed", "disk"])
def test_the_engine_computes_the_trainers_model(ranks: RankPool, tiny_dir: str, transport: str) -> None:
    """32 prompts of text, images and clips, fp32, engine at TP 1: within 1e-5."""
    check_transport(ranks, cases.mixed(load_qwen_config(tiny_dir)), transport, 1e-5)


def test_clips_of_every_length_and_rate(ranks: RankPool, tiny_dir: str) -> None:
    """20 clips of 2 to 16 frames at 0.5 to 8 frames per second, through embeddings: within 1e-5."""
    found = ranks.run(jobs.compare, cases.videos(load_qwen_config(tiny_dir)))[0]
    print(figures(found))
    assert found["sampled"] <= 1e-5
    assert found["scored"] <= 1e-5


def swapped(prompt: Prompt, order: list[int]) -> Prompt:
    """The clip with its temporal patches in another order."""
    medium = prompt.media[0]
    t, h, w = medium.plan.grid
    assert medium.patches is not None
    frames = medium.patches.view(t, h * w, -1)[order].reshape(t * h * w, -1)
    return replace(prompt, media=(PromptMedia(medium.plan, frames),))


def test_the_engine_is_not_blind(ranks: RankPool, tiny_dir: str) -> None:
    """Another clip, or the same clip's frames shuffled, moves log-probs by far more than the parity error."""
    qwen = load_qwen_config(tiny_dir)
    clip = cases.prompt(qwen, "clip", 7, [("video", (4, 4, 6), 1.0)])
    other = replace(clip, media=cases.prompt(qwen, "other", 8, [("video", (4, 4, 6), 1.0)]).media)
    shuffled = swapped(clip, [2, 0, 3, 1])
    answer = [11, 12, 13, 14]
    rows = torch.tensor(ranks.run(jobs.score, [clip, other, shuffled], [answer] * 3)[0])
    other_moves, shuffling_moves = (rows[0] - rows[1]).abs().max(), (rows[0] - rows[2]).abs().max()
    print(f"another clip moves log-probs by {other_moves:.2e}, its frames shuffled by {shuffling_moves:.2e}")
    assert other_moves >= 10 * 1e-5
    assert shuffling_moves >= 10 * 1e-5


def test_a_group_shares_its_prompt_in_the_cache(ranks: RankPool, tiny_dir: str) -> None:
    """All answers of a group come, each once, under distinct indices, with banned ids absent."""
    qwen = load_qwen_config(tiny_dir)
    prompts = cases.mixed(qwen)[:8]
    answers = ranks.run(jobs.sample, prompts, 4)[0]
    assert sorted(answers) == sorted((p.sample.id, i) for p in prompts for i in range(4))


def test_an_aborted_answer_is_carried_on(ranks: RankPool, tiny_dir: str) -> None:
    """Its tokens so far come back marked, go in as a prefix under new weights, and both versions are kept."""
    result = ranks.run(jobs.carry_on, cases.mixed(load_qwen_config(tiny_dir))[:6])[0]
    assert result["aborted"], "nothing was left unfinished to carry on"
    for before, after, error in result["aborted"]:
        assert after.token_ids[: len(before.token_ids)] == before.token_ids
        if before.token_ids:
            assert [piece[0] for piece in after.weight_versions] == result["versions"]
        assert error <= 1e-5


def test_a_changed_tensor_stops_the_run_and_is_named(ranks: RankPool) -> None:
    """The first one that differs, on every rank; afterwards a good push heals it."""
    name = "model.layers.3.self_attn.k_proj.weight"
    messages = ranks.run(jobs.push_damaged, name)
    assert all(f"{name} differs in engine sglang (1 of " in message for message in messages)


def test_a_failing_rank_fails_all(ranks: RankPool) -> None:
    """Nobody hangs; all name the rank."""
    errors = ranks.run(jobs.push_failing, 2)
    assert all("rank 2" in error for error in errors[:2] + errors[3:])
    assert "broken on purpose" in errors[2]


def test_shards_of_another_node_are_forwarded(ranks: RankPool, tiny_dir: str) -> None:
    """With the second stage on a node of its own the result is the same."""
    ranks.run(jobs.disturb, 77)
    ranks.run(jobs.push, "ipc", bucket_bytes=256 << 10, far_stage=True)
    found = ranks.run(jobs.compare, cases.mixed(load_qwen_config(tiny_dir))[:6])[0]
    assert found["sampled"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["ipc", "distributed", "disk"])
def test_the_engine_at_tp2(ranks_tp2: RankPool, tiny_dir: str, transport: str) -> None:
    """The same with the engine split over two ranks: within 1e-4."""
    check_transport(ranks_tp2, cases.mixed(load_qwen_config(tiny_dir)), transport, 1e-4)


@pytest.mark.slow
def test_bf16(pool4: RankPool, tiny_dir: str, sglang_python: str, tmp_path: Path) -> None:
    """Mean difference within 0.01."""
    config = cases.config(tiny_dir, str(tmp_path), sglang_python, dtype="bf16", **LAYOUT)
    for pool in running(pool4, config):
        pool.run(jobs.push, "ipc")
        found = pool.run(jobs.compare, cases.mixed(load_qwen_config(tiny_dir)))[0]
        print(figures(found))
        assert found["mean"] <= 0.01
