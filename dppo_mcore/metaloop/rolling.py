"""Rolling out a list of samples: decode, generate, score, record; what the ledger has already is not done again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dppo_mcore.data.loader import divide, home_of
from dppo_mcore.data.messages import Request
from dppo_mcore.learn import replay
from dppo_mcore.learn.flops import generation_flops
from dppo_mcore.learn.rl import Group
from dppo_mcore.metaloop.run import Run
from dppo_mcore.rollout.base import GenerationRequest, Sampling
from dppo_mcore.runtime.log import progress
from dppo_mcore.types import Prompt, PromptMedia, Rollout, ScoredRollout


@dataclass(frozen=True)
class Batch:
    """A replica's groups of one step, and what they took."""

    groups: list[Group]
    metrics: dict[str, float]
    """Seconds by stage, and on rank 0 the operations of generation over all replicas; under their logged names."""


Recorded = dict[str, list[ScoredRollout]]


def roll_out(
    run: Run,
    ids: Sequence[str],
    n: int,
    *,
    pool: str,
    horizon: float | None,
    label: str,
    sampling: Sampling | None = None,
    recorded: Recorded | None = None,
    record: Callable[[list[ScoredRollout]], None] | None = None,
    trains: bool = False,
    upcoming: Sequence[str] = (),
) -> Batch:
    """`n` scored answers for each of this replica's share of `ids`. Collective over all ranks.

    `label` makes the seeds of this batch its own. `recorded` (equal on all ranks) holds answers that exist already;
    `record` is called on rank 0 with all new ones before anything is trained on. With `--dump-rollouts` the groups are
    written under their label, decoded media only where the batch `trains`; with `--replay-rollouts` they are read.
    `upcoming` is what the next batch probably asks for; it's decoded while this one is generated.
    """
    recorded = recorded or {}
    if run.config.output.replay_rollouts:
        return _replay(run, label, recorded, record)
    began = time.perf_counter()
    prompts = load_prompts(run, ids, pool, horizon)
    announce(run, upcoming, pool, horizon)
    decoded = time.perf_counter()
    requests = [
        GenerationRequest(name, prompt, count, first_index=first, seed=run.config.run.seed_of(label))
        for name, prompt in prompts.items()
        for first, count in owed([answer.rollout.index for answer in recorded.get(name, [])], n)
    ]
    answering = run.engine.generate(requests, sampling or run.sampling) if requests else ()
    rollouts = list(progress(answering, sum(request.n for request in requests), label))
    generated = time.perf_counter()
    if whole := next((rollout for rollout in rollouts if rollout.token_ids), None):
        run.probe = (prompts[whole.sample_id], whole.token_ids)
    fresh = run.exchange.from_leader(lambda: score_all(run, pool, rollouts))
    everyone = run.exchange.at_rank0(fresh)
    if record is not None and run.exchange.rank == 0:
        record(everyone)
    answers: Recorded = {name: list(recorded.get(name, [])) for name in prompts}
    for scored in fresh:
        answers[scored.rollout.sample_id].append(scored)
    groups = [
        Group(prompt, tuple(sorted(answers[name], key=lambda scored: scored.rollout.index)[:n]))
        for name, prompt in prompts.items()
    ]
    if folder := run.config.output.dump_rollouts:
        replay.dump(Path(folder), label, groups if trains else [_without_patches(group) for group in groups])
    metrics = {
        "time/data": decoded - began,
        "time/generate": generated - decoded,
        "time/reward": time.perf_counter() - generated,
    }
    return Batch(groups, metrics | work_of(run, prompts, rollouts))


def work_of(run: Run, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The operations of generating these rollouts, summed over the replicas; known on rank 0. Collective."""
    lengths: dict[str, list[int]] = {}
    for rollout in rollouts:
        lengths.setdefault(rollout.sample_id, []).append(len(rollout.token_ids))
    qwen = run.processor.qwen
    mine = sum(generation_flops(prompts[name], sizes, qwen) for name, sizes in lengths.items())
    return {"rollout/flops": sum(run.exchange.at_rank0([mine]))}


def _replay(run: Run, label: str, recorded: Recorded, record: Callable[[list[ScoredRollout]], None] | None) -> Batch:
    groups = replay.replay(Path(run.config.output.replay_rollouts), label)
    known = {(name, answer.rollout.index) for name, answers in recorded.items() for answer in answers}
    everyone = run.exchange.at_rank0([answer for group in groups for answer in group.answers])
    if record is not None and run.exchange.rank == 0:
        record([scored for scored in everyone if (scored.rollout.sample_id, scored.rollout.index) not in known])
    return Batch(groups, {})


def _without_patches(group: Group) -> Group:
    media = tuple(PromptMedia(medium.plan) for medium in group.prompt.media)
    return replace(group, prompt=replace(group.prompt, media=media))


def owed(have: Sequence[int], n: int) -> list[tuple[int, int]]:
    """(first index, count) of each run of answers 0..n-1 that is missing."""
    return runs_of(set(range(n)) - set(have))


def runs_of(indices: Iterable[int]) -> list[tuple[int, int]]:
    """(first index, count) of each unbroken run of indices."""
    runs: list[tuple[int, int]] = []
    for index in sorted(indices):
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def load_prompts(run: Run, ids: Sequence[str], pool: str, horizon: float | None) -> dict[str, Prompt]:
    """This replica's share, decoded, by id; what is damaged or too long is quarantined by name and left out."""
    mine = my_share(run, questions(run, ids, pool, horizon))
    run.source.keep_only(mine)
    found = [prompt for _, prompt in run.source.stream(mine) if prompt is not None]
    return {prompt.sample.id: prompt for prompt in agreed(run, found)}


def questions(run: Run, ids: Sequence[str], pool: str, horizon: float | None) -> list[Request]:
    """Requests of prompts to be answered; those longer than the engine takes are refused before they are decoded."""
    longest = run.config.rollout.max_prompt_tokens
    return [Request(run.sample(pool, name), horizon, limit=longest) for name in ids]


def agreed(run: Run, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those that all ranks of the replica could read. Collective over the replica.

    Each rank decodes for itself, and all must do the same work: what one failed on, a lost worker's clip for instance,
    is in that rank's quarantine and left out by all.
    """
    common = run.exchange.common([prompt.sample.id for prompt in prompts])
    return [prompt for prompt in prompts if prompt.sample.id in common]


def announce(run: Run, ids: Sequence[str], pool: str, horizon: float | None) -> None:
    """Start decoding this replica's share of what will probably be asked for next. Collective.

    Where rank 0 knows every frame plan it divides as it will then; else each replica takes the clips it is home to.
    """
    if not run.config.data.data_workers:
        return
    replica, replicas = run.exchange.replica, run.exchange.replicas
    requests = questions(run, ids, pool, horizon)
    if replicas > 1:
        parts = run.exchange.from_rank0(
            lambda: divide(run.source, requests, replicas) if run.source.knows(requests) else None
        )
        if parts is None and run.exchange.rank == 0:
            run.source.plan_ahead(requests)
        at_home = (request for request in requests if home_of(request, replicas) == replica)
        requests = list(at_home) if parts is None else [requests[number] for number in parts[replica]]
    run.source.prefetch(requests)


def my_share(run: Run, requests: Sequence[Request]) -> list[Request]:
    """This replica's part of a step's requests, balanced by FLOPs; rank 0 divides, for quarantines may differ."""
    if run.exchange.replicas == 1:
        return list(requests)
    parts = run.exchange.from_rank0(lambda: divide(run.source, requests, run.exchange.replicas))
    return [requests[number] for number in parts[run.exchange.replica]]


def score_all(run: Run, pool: str, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
    """Rewards of rollouts, on the replica's leader."""
    assert run.rewards is not None
    samples = [run.pools[pool].get(rollout.sample_id) for rollout in rollouts]
    return run.rewards.score_rollouts(samples, rollouts)


def greedy(sampling: Sampling) -> Sampling:
    """The same budget and stops without chance."""
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=0)
