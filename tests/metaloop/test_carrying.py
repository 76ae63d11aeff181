"""Answers that go on in the next step under its weights: the ledger stays exact, also through kills."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from dppo_mcore.practice.ledger import Ledger
from tests.metaloop import harness

OPTIONS = {
    "mode": "rl-only", "base_sft_steps": 0, "rollout_partial": True, "rollout_step_tokens": 4, "tis_cap": 2.0,
    "max_response_tokens": 12, "buffer_samples": 24, "buffer_rollouts": 2, "prompts_per_step": 3, "group_size": 4,
    "rl_min_steps": 6, "rl_max_steps": 6, "save_interval": 2, "eval_samples": 4, "temperature": 1.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tabletop."""
    return harness.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    harness.finish(harness.command(world, run, **OPTIONS), run.with_suffix(".log"))
    return run


def check(run: Path) -> None:
    """Each prompt of a step has its four answers, no more; log-probs and version spans cover every token."""
    with Ledger(run / "ledger.sqlite", write=False) as ledger:
        assert all(phase.state == "done" for phase in ledger.phases())
        counts = Counter((row.step, row.scored.rollout.sample_id) for row in ledger.all_rollouts("1-1 RL"))
        assert counts and set(counts.values()) == {4}
        for row in ledger.all_rollouts("1-1 RL"):
            rollout = row.scored.rollout
            assert rollout.finish_reason in ("stop", "length")
            assert len(rollout.logprobs) == len(rollout.token_ids) <= 12
            spans = rollout.weight_versions
            assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
            assert spans[-1][2] == len(rollout.token_ids)
            # The step before the last finishes nothing beyond its budget; the last one finishes everything.
            assert all(end - start <= 4 for version, start, end in spans if version < spans[-1][0])


def test_long_answers_are_carried_over_several_weights(unbroken: Path) -> None:
    """Some answers have tokens of three versions, each at most four; groups wait for their last answer."""
    check(unbroken)
    with Ledger(unbroken / "ledger.sqlite", write=False) as ledger:
        rows = list(ledger.all_rollouts("1-1 RL"))
        versions = [[version for version, _, _ in row.scored.rollout.weight_versions] for row in rows]
        assert max(map(len, versions)) >= 3
        assert all(spans == sorted(set(spans)) for spans in versions)
        # Version and step count from the same start here, since nothing is trained before this phase.
        assert all(spans[-1] <= row.step for spans, row in zip(versions, rows, strict=True))
        assert sum(trials for trials, _ in ledger.success_rates(["1-1 RL"]).values()) == len(rows)
    logged = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < row.get("rl/tis_weight", 1.0) != 1.0 for row in logged)
    assert not list((unbroken / "carried").glob("*.json"))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_ledger(world: Path, unbroken: Path, tmp_path: Path) -> None:
    """Killed six times at odd moments."""
    command = harness.command(world, tmp_path / "run", **OPTIONS)
    dice = random.Random(1)
    for step in (1, 1, 2, 3, 4, 5):
        assert harness.kill_behind(command, tmp_path / "log", f"1-1 RL step {step:4d}", dice.uniform(0.0, 0.3))
    harness.finish(command, tmp_path / "log")
    check(tmp_path / "run")
    assert harness.digest(tmp_path / "run") == harness.digest(unbroken)


@pytest.mark.slow
def test_two_replicas_share_the_open_groups(world: Path, tmp_path: Path) -> None:
    """Wherever a group goes on, it ends with its answers."""
    harness.finish(harness.command(world, tmp_path / "run", 2, **OPTIONS), tmp_path / "log")
    check(tmp_path / "run")
