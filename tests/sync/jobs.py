"""What the ranks do in sync tests: build and train a model, start an engine, push, compare. Module-level, for pools."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from dppo_mcore.config import Config
from dppo_mcore.data.packing import pack_groups
from dppo_mcore.learn import state, step
from dppo_mcore.rollout.base import GenerationRequest, Sampling, banned_ids, eos_ids, make_engine
from dppo_mcore.runtime import parallel
from dppo_mcore.sync.push import WeightSync, attach
from dppo_mcore.types import Prompt, Rollout
from tests.rollout import cases

KEPT: dict[str, Any] = {}


def build(config: Config, shims: str) -> None:
    """The learner and an engine, kept in this process for the next calls."""
    os.environ["PYTHONPATH"] = shims
    parallel.reinit(config.parallel, seed=0)
    learner = state.build(config)
    KEPT.update(config=config, learner=learner, version=0)


def start(config: Config) -> None:
    """An engine for the kept learner."""
    learner = KEPT["learner"]
    engine = make_engine(config, learner.qwen, learner.models, cases.Spelling())
    engine.start()
    KEPT.update(engine=engine, config=config, sync=attach(learner.models, engine, learner.qwen, config))


def stop() -> None:
    """End the engine."""
    if "engine" in KEPT:
        KEPT.pop("engine").stop()


def disturb(seed: int) -> None:
    """Change every weight, on every rank alike where ranks hold copies, as a training step would."""
    from megatron.core import parallel_state

    rank, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    for model in KEPT["learner"].models:
        for name, parameter in model.named_parameters():
            sharded = getattr(parameter, "tensor_model_parallel", False)
            generator = torch.Generator().manual_seed(hash((seed, stage, len(name), rank if sharded else -1)) % 2**31)
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                if name.startswith("vision."):
                    continue
                parameter.data += (0.02 * noise).to(parameter.dtype)


def push(transport: str, **options: Any) -> dict[str, Any]:
    """One sync over `transport`; figures of its report."""
    learner, engine = KEPT["learner"], KEPT["engine"]
    config = cases.config(
        KEPT["config"].run.model, KEPT["config"].run.run, weight_transport=transport, dtype=KEPT["config"].model.dtype
    )
    sync = WeightSync(learner.models, engine, learner.qwen, config, **options)
    engine.push_again = sync.again
    KEPT["version"] += 1
    report = sync.push(KEPT["version"])
    if sync._transport is not None:
        sync._transport.stop()
    return {
        "buckets": report.buckets,
        "tensors": report.tensors,
        "nbytes": report.nbytes,
        "peak": report.peak_extra_bytes,
    }


def greedy(prompts: Sequence[Prompt], tokens: int = 8) -> list[Rollout]:
    """One greedy answer per prompt, by the engine, in the prompts' order."""
    engine, qwen = KEPT["engine"], KEPT["learner"].qwen
    sampling = Sampling(
        temperature=0.0,
        max_tokens=tokens,
        stop_token_ids=eos_ids(engine.config.run.model),
        banned_token_ids=banned_ids(qwen),
    )
    requests = [GenerationRequest(p.sample.id, p, 1) for p in prompts]
    found = {rollout.sample_id: rollout for rollout in engine.generate(requests, sampling)}
    return [found[p.sample.id] for p in prompts]


def trainer_logprobs(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """The learner's log-probs of each answer."""
    learner = KEPT["learner"]
    batches = [
        pack_groups([p], [[list(a)]], None, learner.qwen, 4096, True, learner.pad_multiple)[0]
        for p, a in zip(prompts, answers, strict=True)
    ]
    return [rows.tolist() for rows in step.logprobs(learner, batches)]


def compare(prompts: Sequence[Prompt], tokens: int = 8) -> dict[str, Any]:
    """Largest difference of engine and trainer log-probs over greedy answers; engine's sampling and scoring both."""
    rollouts = greedy(prompts, tokens)
    expected = trainer_logprobs(prompts, [r.token_ids for r in rollouts])
    scored = KEPT["engine"].score(prompts, [r.token_ids for r in rollouts])
    sampled_errors = [
        abs(a - b) for r, e in zip(rollouts, expected, strict=True) for a, b in zip(r.logprobs, e, strict=True)
    ]
    scored_errors = [abs(a - b) for s, e in zip(scored, expected, strict=True) for a, b in zip(s, e, strict=True)]
    return {
        "sampled": max(sampled_errors),
        "scored": max(scored_errors),
        "mean": sum(sampled_errors) / len(sampled_errors),
        "ids": [r.token_ids for r in rollouts],
        "versions": [r.weight_versions for r in rollouts],
    }
