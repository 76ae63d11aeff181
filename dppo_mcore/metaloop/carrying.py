"""RL steps that don't wait for their longest answers: an answer gets so many tokens a step and goes on in the next one.

A step asks for its new prompts, goes on with the groups that are still open, and trains on those that became whole.
What stays open is written to RUN/carried, one file a step, just before the step's whole groups enter the ledger in one
transaction. So whatever moment a run is killed at, a step in the ledger has its file, and a step that isn't there yet
is rolled out again from the file before it: each prompt has exactly its n answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dppo_mcore.learn.rl import Group
from dppo_mcore.metaloop.rolling import Batch, announce, load_prompts, runs_of, score_all, work_of
from dppo_mcore.metaloop.run import Run
from dppo_mcore.practice.ledger import PhasePlan
from dppo_mcore.rollout.answers import as_prefix
from dppo_mcore.rollout.base import GenerationRequest, Prefix
from dppo_mcore.runtime.files import replacing
from dppo_mcore.types import Prompt, Rollout, ScoredRollout

UNFINISHED = "abort"
NOTHING = Prefix((), (), ())


@dataclass(frozen=True)
class OpenGroup:
    """A prompt some of whose answers haven't ended."""

    sample_id: str
    born: int
    """The step that drew it, which its seeds come from."""
    ended: tuple[ScoredRollout, ...]
    prefixes: Mapping[int, Prefix]
    """By index, what the other answers have so far."""

    def request(self, run: Run, phase: PhasePlan, prompt: Prompt, new_tokens: int | None) -> list[GenerationRequest]:
        """What is still owed, at most `new_tokens` each."""
        seed = run.config.run.seed_of(f"{phase.name}/{self.born}")
        begun = {index: prefix for index, prefix in self.prefixes.items() if prefix.token_ids}
        return [
            GenerationRequest(self.sample_id, prompt, count, first, seed, begun, new_tokens)
            for first, count in runs_of(self.prefixes)
        ]

    def after(self, rollouts: Iterable[Rollout], scored: Iterable[ScoredRollout]) -> OpenGroup:
        """With a step's answers taken in; whole if no prefix is left."""
        ended = sorted([*self.ended, *scored], key=lambda one: one.rollout.index)
        left = {one.index: as_prefix(one) for one in rollouts if one.finish_reason == UNFINISHED}
        return OpenGroup(self.sample_id, self.born, tuple(ended), left)


def step_tokens(run: Run) -> int:
    """New tokens an answer gets in one step."""
    rollout = run.config.rollout
    return rollout.rollout_step_tokens or max(1, rollout.max_response_tokens // 4)


def roll_out_step(run: Run, phase: PhasePlan, ids: Sequence[str], upcoming: Sequence[str], step: int) -> Batch:
    """The replica's share of the groups that become whole in this step; the phase's last step finishes them all.

    A drawn sample whose group is still open isn't begun a second time. Collective over all ranks.
    """
    began = time.perf_counter()
    recorded = run.exchange.from_rank0(lambda: _recorded(run, phase, step))
    if recorded is not None:
        prompts = load_prompts(run, list(recorded), "rl", phase.horizon)
        return Batch([Group(prompt, tuple(recorded[name])) for name, prompt in prompts.items()], {})
    going = {group.sample_id: group for group in run.exchange.from_rank0(lambda: _load(_file(run, phase, step - 1)))}
    empty = dict.fromkeys(range(run.config.rl.group_size), NOTHING)
    going |= {name: OpenGroup(name, step, (), empty) for name in ids if name not in going}
    prompts = load_prompts(run, list(going), "rl", phase.horizon)
    announce(run, [*going, *upcoming], "rl", phase.horizon)
    decoded = time.perf_counter()
    new_tokens = None if step + 1 == run.config.practice.rl_max_steps else step_tokens(run)
    requests = [
        request for name, prompt in prompts.items() for request in going[name].request(run, phase, prompt, new_tokens)
    ]
    rollouts = list(run.engine.generate(requests, run.sampling)) if requests else []
    generated = time.perf_counter()
    if probe := next((one for one in rollouts if one.token_ids), None):
        run.probe = (prompts[probe.sample_id], probe.token_ids)
    ended = [one for one in rollouts if one.finish_reason != UNFINISHED]
    scored = run.exchange.from_leader(lambda: score_all(run, "rl", ended))
    groups = [
        going[name].after(
            (one for one in rollouts if one.sample_id == name), (one for one in scored if one.rollout.sample_id == name)
        )
        for name in prompts
    ]
    whole = [group for group in groups if not group.prefixes]
    _record(run, phase, step, whole, [group for group in groups if group.prefixes])
    metrics = {
        "time/data": decoded - began,
        "time/generate": generated - decoded,
        "time/reward": time.perf_counter() - generated,
    }
    work = work_of(run, prompts, rollouts)
    return Batch([Group(prompts[group.sample_id], group.ended) for group in whole], metrics | work)


def forget(run: Run, phase: PhasePlan, step: int) -> None:
    """A finished phase's files go; what a phase that stagnated left open is given up, and said."""
    if run.exchange.rank != 0 or not run.config.rollout.rollout_partial:
        return
    if left := _load(_file(run, phase, step - 1)):
        run.say(f"{phase.name}: {len(left)} groups were still open and are given up")
    for file in _folder(run).glob(f"{_stem(phase)}-*.json"):
        file.unlink()


def _record(run: Run, phase: PhasePlan, step: int, whole: list[OpenGroup], still: list[OpenGroup]) -> None:
    whole, still = run.exchange.at_rank0(whole), run.exchange.at_rank0(still)
    if run.exchange.rank != 0:
        return
    content = {"whole": [group.sample_id for group in whole], "open": [asdict(group) for group in still]}
    with replacing(_file(run, phase, step)) as file:
        json.dump(content, file)
    run.ledger.record_rollouts(phase.name, step, [one for group in whole for one in group.ended])


def _recorded(run: Run, phase: PhasePlan, step: int) -> dict[str, list[ScoredRollout]] | None:
    """A step's whole groups, if both its file and the ledger have them.

    A step rolled out before the option was given has no file; what the ledger holds is then all there is of it.
    """
    file, found = _file(run, phase, step), run.ledger.rollouts(phase.name, step)
    if not file.exists():
        return found or None
    names = json.loads(file.read_text())["whole"]
    if any(len(found.get(name, ())) != run.config.rl.group_size for name in names):
        return None
    return {name: found[name] for name in names}


def _load(file: Path) -> list[OpenGroup]:
    """The groups a step left open; none before the first step."""
    if not file.exists():
        return []
    return [_group(raw) for raw in json.loads(file.read_text())["open"]]


def _group(raw: Mapping[str, Any]) -> OpenGroup:
    ended = tuple(_scored(one) for one in raw["ended"])
    prefixes = {
        int(index): Prefix(tuple(one["token_ids"]), tuple(one["logprobs"]), _versions(one))
        for index, one in raw["prefixes"].items()
    }
    return OpenGroup(raw["sample_id"], raw["born"], ended, prefixes)


def _scored(raw: Mapping[str, Any]) -> ScoredRollout:
    one = dict(raw["rollout"])
    one |= {"token_ids": tuple(one["token_ids"]), "logprobs": tuple(one["logprobs"]), "weight_versions": _versions(one)}
    return ScoredRollout(**{**raw, "rollout": Rollout(**one)})


def _versions(raw: Mapping[str, Any]) -> tuple[tuple[int, int, int], ...]:
    return tuple((version, start, end) for version, start, end in raw["weight_versions"])


def _folder(run: Run) -> Path:
    assert run.folder is not None
    return run.folder / "carried"


def _stem(phase: PhasePlan) -> str:
    return phase.name.replace(" ", "_")


def _file(run: Run, phase: PhasePlan, step: int) -> Path:
    return _folder(run) / f"{_stem(phase)}-{step}.json"
