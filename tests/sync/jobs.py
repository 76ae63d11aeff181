"""What the ranks do in sync tests: build and train a model, start an engine, push, compare. Module-level, for pools."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dppo_mcore.config import Config
from dppo_mcore.data.packing import pack_groups
from dppo_mcore.learn import state, step
from dppo_mcore.learn.sft import sft_step
from dppo_mcore.rollout.answers import as_prefix
from dppo_mcore.rollout.base import GenerationRequest, Sampling, banned_ids, eos_ids, make_engine, sampling_from
from dppo_mcore.runtime import parallel
from dppo_mcore.sync import buffers
from dppo_mcore.sync.push import WeightSync, attach
from dppo_mcore.types import Prompt, Rollout
from tests.learn.groups import random_conversations
from tests.rollout import cases

KEPT: dict[str, Any] = {}
ATTACH = buffers.attach


def nowhere(handle: Any) -> Any:
    """Memory of another machine."""
    raise FileNotFoundError(f"{handle} is on another node")


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


def train(steps: int) -> None:
    """A few optimizer steps on random conversations, so that the weights are a trainer's."""
    learner = KEPT["learner"]
    learner.begin_phase("sft", 1e-3, steps)
    for number in range(steps):
        sft_step(learner, random_conversations(learner.qwen, 4, seed=number))


def make_sync(transport: str, far_stage: bool = False, **options: Any) -> WeightSync:
    """A sync of the kept engine over `transport`; with `far_stage` later stages claim to be on another node.

    The leader's memory doesn't exist there: whoever tries to map it fails.
    """
    from megatron.core import parallel_state

    learner, engine = KEPT["learner"], KEPT["engine"]
    config = replace(KEPT["config"], rollout=replace(KEPT["config"].rollout, weight_transport=transport))
    if far_stage:
        options["host"] = f"node-{min(1, parallel_state.get_pipeline_model_parallel_rank())}"
    buffers.attach = nowhere if options.get("host") == "node-1" else ATTACH
    sync = WeightSync(learner.models, engine, learner.qwen, config, **options)
    engine.push_again = sync.again
    return sync


def push(transport: str, **options: Any) -> dict[str, Any]:
    """One sync; figures of its report."""
    sync = make_sync(transport, **options)
    KEPT["version"] += 1
    report = sync.push(KEPT["version"])
    largest = max(bucket.nbytes for bucket in sync.plan().buckets)
    sync.stop()
    return {"buckets": report.buckets, "nbytes": report.nbytes, "peak": report.peak_extra_bytes, "largest": largest}


def push_damaged(name: str) -> str:
    """A sync whose buffer has one tensor changed on its way; its message, then a good one."""
    sync = make_sync("ipc")
    transport = sync._transport
    assert transport is not None
    load = transport.load

    def damage(slots: Any, buffer: Any) -> None:
        for slot in slots:
            if slot.name == name:
                slot.view(buffer.bytes()).view(-1)[3] += 1
        load(slots, buffer)

    transport.load = damage  # type: ignore[method-assign]
    KEPT["version"] += 1
    try:
        sync.push(KEPT["version"])
    except Exception as error:
        message = str(error)
    else:
        message = "nothing was noticed"
    push("ipc")
    return message


def push_failing(rank: int) -> str:
    """A sync in which one rank breaks while it writes; its message on this rank, then a good sync."""
    sync = make_sync("ipc", bucket_bytes=256 << 10)
    if torch.distributed.get_rank() == rank:

        def broken(item: Any) -> Any:
            raise RuntimeError("broken on purpose")

        sync._pieces = broken  # type: ignore[method-assign]
    KEPT["version"] += 1
    try:
        sync.push(KEPT["version"])
    except Exception as error:
        message = str(error)
    else:
        message = "nothing failed"
    push("ipc")
    return message


def greedy(prompts: Sequence[Prompt], tokens: int = 8) -> list[Rollout]:
    """One greedy answer per prompt, by the engine, in the prompts' order."""
    engine = KEPT["engine"]
    # Nothing is banned, so that log-probs are comparable with those over the whole vocabulary.
    sampling = Sampling(temperature=0.0, max_tokens=tokens, stop_token_ids=eos_ids(engine.config.run.model))
    requests = [GenerationRequest(p.sample.id, p, 1) for p in prompts]
    found = {rollout.sample_id: _before_media(rollout) for rollout in engine.generate(requests, sampling)}
    return [found[p.sample.id] for p in prompts]


def _before_media(rollout: Rollout) -> Rollout:
    """The answer up to the first media id, which random weights may well sample and no trainer takes."""
    banned = banned_ids(KEPT["learner"].qwen)
    end = next((i for i, token in enumerate(rollout.token_ids) if token in banned), len(rollout.token_ids))
    return replace(rollout, token_ids=rollout.token_ids[:end], logprobs=rollout.logprobs[:end])


def trainer_logprobs(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """The learner's log-probs of each answer."""
    learner = KEPT["learner"]
    batches = [
        pack_groups([p], [[list(a)]], None, learner.qwen, 4096, True, learner.pad_multiple)[0]
        for p, a in zip(prompts, answers, strict=True)
    ]
    return [rows.tolist() for rows in step.logprobs(learner, batches)]


def score(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """The engine's log-probs of given answers."""
    return KEPT["engine"].score(prompts, answers)


def sample(prompts: Sequence[Prompt], n: int) -> list[tuple[str, int]]:
    """Sampled groups as training samples them; (sample, index) of every answer."""
    engine, qwen = KEPT["engine"], KEPT["learner"].qwen
    sampling = sampling_from(engine.config, qwen)
    requests = [GenerationRequest(p.sample.id, p, n, seed=5) for p in prompts]
    rollouts = list(engine.generate(requests, sampling))
    assert not any(set(banned_ids(qwen)) & set(rollout.token_ids) for rollout in rollouts)
    assert all(len(rollout.token_ids) <= sampling.max_tokens for rollout in rollouts)
    return [(rollout.sample_id, rollout.index) for rollout in rollouts]


def carry_on(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Abort a generation after its first answers, push other weights, carry the rest on under them."""
    engine = KEPT["engine"]
    first_version = KEPT["version"]
    sampling = Sampling(temperature=1.0, max_tokens=160)
    finished: list[Rollout] = []
    aborted: list[Rollout] = []
    for rollout in engine.generate(
        [GenerationRequest(p.sample.id, p, 2, seed=3) for p in prompts],
        sampling,
    ):
        (aborted if rollout.finish_reason == "abort" else finished).append(rollout)
        engine.abort()
    aborted = [_shorter(r, min(40, len(_before_media(r).token_ids))) for r in aborted or finished]
    disturb(9)
    push("ipc")
    by_name = {p.sample.id: p for p in prompts}
    requests = [
        GenerationRequest(r.sample_id, by_name[r.sample_id], 1, r.index, 3, {r.index: as_prefix(r)}) for r in aborted
    ]
    longest = max(len(r.token_ids) for r in aborted)
    after = {(r.sample_id, r.index): r for r in engine.generate(requests, replace(sampling, max_tokens=longest + 8))}
    results = []
    for before in aborted:
        whole = _before_media(after[before.sample_id, before.index])
        expected = trainer_logprobs([by_name[before.sample_id]], [whole.token_ids])[0]
        start = len(before.token_ids)
        errors = [abs(a - b) for a, b in zip(whole.logprobs[start:], expected[start:], strict=True)]
        results.append((before, whole, max(errors, default=0.0)))
    return {"aborted": results, "versions": [first_version, KEPT["version"]]}


def _shorter(rollout: Rollout, count: int) -> Rollout:
    """Its first tokens, as if it had been aborted there."""
    version = rollout.weight_versions[0][0] if rollout.weight_versions else 0
    return replace(
        rollout,
        token_ids=rollout.token_ids[:count],
        logprobs=rollout.logprobs[:count],
        weight_versions=((version, 0, count),) if count else (),
        finish_reason="abort",
    )


def embedded_greedy(prompts: Sequence[Prompt], tokens: int) -> list[tuple[int, ...]]:
    """The embedded engine's greedy answers with the same weights."""
    learner, config = KEPT["learner"], KEPT["config"]
    config = replace(config, rollout=replace(config.rollout, rollout_engine="inprocess"))
    engine = make_engine(config, learner.qwen, learner.models, cases.Spelling())
    engine.start()
    sampling = Sampling(temperature=0.0, max_tokens=tokens, stop_token_ids=eos_ids(config.run.model))
    requests = [GenerationRequest(p.sample.id, p, 1) for p in prompts]
    found = {rollout.sample_id: _before_media(rollout).token_ids for rollout in engine.generate(requests, sampling)}
    engine.stop()
    return [found[p.sample.id] for p in prompts]


def compare(prompts: Sequence[Prompt], tokens: int = 8) -> dict[str, Any]:
    """Largest difference of engine and trainer log-probs over greedy answers; engine's sampling and scoring both."""
    rollouts = greedy(prompts, tokens)
    kept = [(p, r) for p, r in zip(prompts, rollouts, strict=True) if r.token_ids]
    scored_prompts, answers = [p for p, _ in kept], [r.token_ids for _, r in kept]
    expected = trainer_logprobs(scored_prompts, answers)
    scored = KEPT["engine"].score(scored_prompts, answers)
    sampled_errors = [
        abs(a - b) for (_, r), e in zip(kept, expected, strict=True) for a, b in zip(r.logprobs, e, strict=True)
    ]
    scored_errors = [abs(a - b) for s, e in zip(scored, expected, strict=True) for a, b in zip(s, e, strict=True)]
    return {
        "sampled": max(sampled_errors),
        "scored": max(scored_errors),
        "tokens": len(sampled_errors),
        "mean": sum(sampled_errors) / len(sampled_errors),
        "ids": [r.token_ids for r in rollouts],
        "greedy": embedded_greedy(prompts, tokens),
        "versions": [r.weight_versions for r in rollouts],
        "version": KEPT["version"],
    }
