"""The protocol suite: what must hold for every engine, whoever generates behind it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from dppo_mcore.rollout.answers import as_prefix
from dppo_mcore.rollout.base import GenerationRequest, Sampling
from dppo_mcore.types import Prompt, Sample


def prompts(count: int) -> list[Prompt]:
    """Short text prompts."""
    return [Prompt(Sample(f"p{i}", "exact", ()), tuple(range(1 + i, 9 + i))) for i in range(count)]


def check_protocol(engine: Any, eos: int) -> None:
    """Groups, budgets, bans, versions, prefixes, abort, early end, health."""
    sampling = Sampling(max_tokens=6, stop_token_ids=(eos,), banned_token_ids=(3, 4))
    asked = [GenerationRequest(p.sample.id, p, 3, first_index=2, seed=1) for p in prompts(5)]
    rollouts = list(engine.generate(asked, sampling))
    assert Counter((r.sample_id, r.index) for r in rollouts) == Counter(
        (p.sample.id, index) for p in prompts(5) for index in (2, 3, 4)
    )
    for rollout in rollouts:
        assert len(rollout.token_ids) == len(rollout.logprobs) <= 6
        assert not {3, 4} & set(rollout.token_ids)
        assert (eos in rollout.token_ids) == (rollout.finish_reason == "stop")
        assert eos not in rollout.token_ids[:-1]
        covered = [piece for piece in rollout.weight_versions]
        assert not rollout.token_ids or (covered[0][1], covered[-1][2]) == (0, len(rollout.token_ids))
        assert all(piece[0] == engine.weight_version for piece in covered)

    partial = replace(rollouts[0], token_ids=(10, 11), logprobs=(-1.0, -2.0), weight_versions=((0, 0, 2),))
    resumed = GenerationRequest("p0", prompts(1)[0], 1, prefixes={0: as_prefix(partial)})
    (carried,) = engine.generate([resumed], sampling)
    assert carried.token_ids[:2] == (10, 11) and carried.logprobs[:2] == (-1.0, -2.0)
    assert len(carried.token_ids) <= 6
    assert carried.weight_versions[0] == (0, 0, 2)

    check_steps(engine, asked, sampling)

    walk = engine.generate(asked, sampling)
    next(walk)
    walk.close()
    left = Counter()
    for number, rollout in enumerate(engine.generate(asked, sampling)):
        left[rollout.sample_id, rollout.index] += 1
        if number == 0:
            engine.abort()
    assert set(left.values()) == {1} and len(left) == 15
    assert list(engine.generate([], sampling)) == []
    assert engine.health()


def check_steps(engine: Any, asked: list[GenerationRequest], sampling: Sampling) -> None:
    """Two tokens a call, carried on until every answer ended: each once, none beyond the whole budget."""
    left, ended, calls = [replace(request, new_tokens=2) for request in asked], [], 0
    while left:
        rollouts = list(engine.generate(left, sampling))
        calls += 1
        unfinished = [r for r in rollouts if r.finish_reason == "abort"]
        assert all(len(r.token_ids) == 2 * calls for r in unfinished)
        ended += [r for r in rollouts if r.finish_reason != "abort"]
        by_name = {request.sample_id: request for request in asked}
        left = [
            replace(by_name[r.sample_id], n=1, first_index=r.index, prefixes={r.index: as_prefix(r)}, new_tokens=2)
            for r in unfinished
        ]
    assert calls == 3
    assert Counter((r.sample_id, r.index) for r in ended) == Counter((q.sample_id, i) for q in asked for i in q.indices)
    assert {len(r.token_ids) for r in ended if r.finish_reason == "length"} == {sampling.max_tokens}
