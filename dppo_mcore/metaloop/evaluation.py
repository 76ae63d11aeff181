"""Greedy evaluation on held-out sets, with intervals, into the ledger."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dppo_mcore.metaloop.pools import HELD_OUT
from dppo_mcore.metaloop.rolling import greedy, roll_out
from dppo_mcore.metaloop.run import Run
from dppo_mcore.metaloop.weights import awake
from dppo_mcore.practice.ledger import Evaluation
from dppo_mcore.runtime import faults
from dppo_mcore.types import Sample, ScoredRollout

CHUNK = 256
"""Samples rolled out at a time."""
Z95 = 1.959964


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """95% interval of a share."""
    if trials == 0:
        return (0.0, 1.0)
    p, z2 = successes / trials, Z95 * Z95
    middle = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    return (max(0.0, middle - half), min(1.0, middle + half))


def summarise(samples: Sequence[Sample], answers: Sequence[ScoredRollout]) -> dict[str, Any]:
    """Success with its interval and the mean reward parts: over all, by objective, by dimension, by source."""

    def of(rows: list[ScoredRollout]) -> dict[str, Any]:
        successes = sum(row.success for row in rows)
        low, high = wilson(successes, len(rows))
        mean = {part: sum(row.parts.get(part, 0.0) for row in rows) / len(rows) for part in ("task", "format")}
        return {"n": len(rows), "success": successes / len(rows), "low": low, "high": high, **mean}

    by: dict[str, dict[str, list[ScoredRollout]]] = {
        name: defaultdict(list) for name in ("objective", "dimension", "source")
    }
    for sample, answer in zip(samples, answers, strict=True):
        for name, groups in by.items():
            groups[getattr(sample, name) or "none"].append(answer)
    tables = {name: {key: of(rows) for key, rows in sorted(groups.items())} for name, groups in by.items()}
    return {"all": of(list(answers)) if answers else {}, **tables}


def evaluate(run: Run, phase: str, step: int) -> dict[str, dict[str, Any]]:
    """Evaluate the present weights on every held-out pool, once per (phase, step). Collective."""
    results: dict[str, dict[str, Any]] = {}
    for pool in HELD_OUT:
        if pool not in run.pools or not len(run.pools[pool]):
            continue
        known = run.exchange.from_rank0(
            lambda pool=pool: next(
                (e.metrics for e in run.ledger.evaluations() if (e.phase, e.step, e.name) == (phase, step, pool)),
                None,
            )
        )
        results[pool] = dict(known) if known is not None else _evaluate_pool(run, pool, phase, step)
    started = run.exchange.from_rank0(lambda: first_success(run.ledger.evaluations()))
    run.metrics.log(run.step, flat_metrics(results, started), phase=phase)
    shown = ", ".join(_shown(pool, table, started.get(pool)) for pool, table in results.items())
    run.say(f"{phase} step {step}: held-out {shown}")
    return results


def evaluate_start(run: Run, phase: str) -> None:
    """Evaluate the weights a run begins with, so that what is forgotten later has something to be forgotten from."""
    before = run.exchange.from_rank0(lambda: {(entry.phase, entry.step) for entry in run.ledger.evaluations()})
    if run.step == 0 and before <= {(phase, 0)} and any(len(run.pools.get(pool, ())) for pool in HELD_OUT):
        evaluate(run, phase, 0)


def first_success(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Success of each pool at its first evaluation."""
    first: dict[str, float] = {}
    for entry in evaluations:
        if entry.metrics["all"]:
            first.setdefault(entry.name, entry.metrics["all"]["success"])
    return first


def flat_metrics(
    results: Mapping[str, Mapping[str, Any]], started: Mapping[str, float] | None = None
) -> dict[str, float]:
    """An evaluation under the metrics' names; a pool without a single answer has none."""
    values: dict[str, float] = {}
    for pool, name in (("eval", "eval/success"), ("eval-general", "eval/general")):
        if pool in results and results[pool]["all"]:
            values[name] = results[pool]["all"]["success"]
    if "eval/success" in values:
        for name, table in results["eval"]["objective"].items():
            values[f"eval/success/{name}"] = table["success"]
    if "eval/general" in values and started and "eval-general" in started:
        values["eval/forgotten"] = started["eval-general"] - values["eval/general"]
    return values


def _shown(pool: str, table: Mapping[str, Any], started: float | None) -> str:
    whole = table["all"]
    if not whole:
        return f"{pool} without an answer (every sample's media are damaged)"
    parts = " ".join(f"{name} {entry['success']:.2f}" for name, entry in table["objective"].items())
    change = "" if started is None else f", {whole['success'] - started:+.3f} since the start"
    return f"{pool} {whole['success']:.3f} [{whole['low']:.3f}, {whole['high']:.3f}]{change} ({parts})"


def _evaluate_pool(run: Run, pool: str, phase: str, step: int) -> dict[str, Any]:
    samples, answers = answer_pool(run, pool, run.config.output.eval_samples)

    def keep() -> dict[str, Any]:
        metrics = summarise(samples, answers)
        if answers:  # else a run that goes on with its media mended evaluates again
            run.ledger.record_evaluation(phase, step, pool, metrics, answers)
        return metrics

    return run.exchange.from_rank0(keep)


def answer_pool(run: Run, pool: str, limit: int = 0) -> tuple[list[Sample], list[ScoredRollout]]:
    """Greedy answers to a pool's first `limit` samples (0: all) in manifest order, on rank 0. Collective.

    A sample whose media are damaged has no answer and is left out of both lists. SIGTERM ends it at the next chunk.
    """
    manifest = run.pools[pool]
    size = min(len(manifest), limit or len(manifest))
    by_id: dict[str, ScoredRollout] = {}
    horizon = run.config.practice.horizons[-1]
    stopped = False
    with awake(run):
        for start in range(0, size, CHUNK):
            if stopped := faults.stop_requested():
                break  # the engine is put to sleep first: what was trained may still have to be saved
            ids = [manifest[row].id for row in range(start, min(start + CHUNK, size))]
            label = f"eval {pool} {run.step}/{start}"
            batch = roll_out(run, ids, 1, pool=pool, horizon=horizon, label=label, sampling=greedy(run.sampling))
            for answer in run.exchange.at_rank0([answer for group in batch.groups for answer in group.answers]):
                by_id[answer.rollout.sample_id] = answer
    if stopped:
        raise faults.Preempted
    samples = [sample for row in range(size) if (sample := manifest[row]).id in by_id]
    return samples, [by_id[sample.id] for sample in samples]
