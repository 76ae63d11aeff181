"""Phases that only roll out: success rates for a loop's buffer, and mining what RL left unsolved for the teacher."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict

import numpy as np

from dppo_mcore.metaloop import position, usable
from dppo_mcore.metaloop.rolling import roll_out
from dppo_mcore.metaloop.run import Run
from dppo_mcore.metaloop.weights import awake
from dppo_mcore.practice import curriculum, weakness
from dppo_mcore.practice.difficulty import make_buffer
from dppo_mcore.practice.ledger import PhasePlan
from dppo_mcore.practice.teacher import Teacher, collect, make_teacher
from dppo_mcore.runtime import faults
from dppo_mcore.types import Sample

CHUNK = 512
"""Samples rolled out at a time while success rates are measured."""
KEY_VARIABLE = "DPPO_TEACHER_API_KEY"


def measure(run: Run, phase: PhasePlan, ids: list[str], n: int) -> None:
    """Roll every sample out `n` times under the present weights, into the ledger; resumable by chunk."""
    began = time.monotonic()
    with awake(run):
        for number, start in enumerate(range(0, len(ids), CHUNK)):
            recorded = run.exchange.from_rank0(lambda number=number: run.ledger.rollouts(phase.name, number))
            chunk = ids[start : start + CHUNK]
            if all(len(recorded.get(name, ())) >= n for name in chunk):
                continue
            batch = roll_out(
                run,
                chunk,
                n,
                pool="rl",
                horizon=phase.horizon,
                label=f"{phase.name}/{number}",
                recorded=recorded,
                record=lambda new, number=number: run.ledger.record_rollouts(phase.name, number, new),
                upcoming=ids[start + CHUNK : start + 2 * CHUNK],
            )
            run.metrics.log(run.step, batch.metrics, phase=phase.name, phase_step=number)
            position.stop_if_asked(run)
    run.say(f"{phase.name}: {len(ids)} samples x {n} answers in {time.monotonic() - began:.0f} s")


def pool_ids(run: Run, phase: PhasePlan) -> list[str]:
    """The samples a buffer is made of: the whole pool, or a seeded draw of `buffer_samples`."""

    def choose() -> list[str]:
        manifest, wanted = run.pools["rl"], run.config.practice.buffer_samples
        rows = np.arange(len(manifest))
        if wanted and wanted < len(manifest):
            rng = np.random.default_rng(run.config.run.seed_of(f"buffer {phase.name}"))
            rows = np.sort(rng.choice(len(manifest), wanted, replace=False))
        return [manifest[int(row)].id for row in rows]

    return run.exchange.from_rank0(choose)


def fill_buffer(run: Run, phase: PhasePlan) -> None:
    """Success rate of every sample, and what becomes of it in the coming RL phase."""
    practice = run.config.practice
    if practice.sampling == "random":
        finish(run, phase, "random sampling needs no buffer")
        return
    ids = pool_ids(run, phase)
    measure(run, phase, ids, practice.buffer_rollouts)
    usable.require(run, phase.name, ids, phase.horizon)
    if run.exchange.rank == 0:
        ledger = run.ledger
        rows = make_buffer(
            ledger.samples("rl").values(),
            ledger.success_rates([phase.name]),
            intractable_share=practice.intractable_share,
            anchor_share=practice.anchor_share,
            last_tries=ledger.last_tries([p.name for p in ledger.phases() if p.name != phase.name]),
            seed=run.config.run.seed_of(phase.name),
        )
        ledger.record_buffer(phase.name, rows)
        counts: dict[str, int] = defaultdict(int)
        for row in rows:
            counts[row.status] += 1
        reason = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        ledger.decide(phase.name, 0, "buffer", dict(counts), reason)
        run.say(f"{phase.name}: {reason}")
    finish(run, phase, "measured")


def find_weaknesses(run: Run, phase: PhasePlan) -> None:
    """Roll out again what RL left unsolved; what stays at success rate 0 goes to the teacher."""
    practice = run.config.practice
    before = [curriculum.buffer_name(phase.loop), curriculum.rl_name(phase.loop)]
    seed = run.config.run.seed_of(phase.name)

    def choose() -> list[str] | None:
        known = {row.name for row in run.ledger.phases()}
        measured = [name for name in before if name in known]
        return weakness.candidates(run.ledger, measured, practice.buffer_samples, seed) if measured else None

    unsolved = run.exchange.from_rank0(choose)
    # Only a loop without RL has measured nothing; one that left nothing unsolved has nothing to mine.
    ids = pool_ids(run, phase) if unsolved is None else unsolved
    measure(run, phase, ids, practice.buffer_rollouts)
    usable.require(run, phase.name, ids, phase.horizon, least=1 if unsolved is None else usable.ENOUGH)
    run.exchange.from_rank0(lambda: ask_teacher(run, phase.name))
    position.stop_if_asked(run)
    finish(run, phase, "mined")


def ask_teacher(run: Run, phase: str) -> None:
    """Answers to a weakness phase's unsolved samples, on rank 0; asks only for what the ledger lacks."""
    practice, ledger = run.config.practice, run.ledger
    weak_ids = weakness.weak(ledger, phase)
    dimensions = weakness.weak_dimensions(ledger.samples("rl").values(), ledger.success_rates([phase]).keys(), weak_ids)
    shown = ", ".join(f"{d.dimension or 'none'} {d.weak}/{d.mined}" for d in dimensions[:9])
    ledger.decide(phase, 0, "weakness", {"weak": len(weak_ids)}, shown)
    run.say(f"{phase}: {len(weak_ids)} samples without a right answer ({shown})")
    teacher = teacher_of(run, ledger.phase(phase).horizon)
    if teacher is None or not weak_ids:
        return
    assert run.rewards is not None
    result = collect(
        ledger,
        phase,
        [run.pools["rl"].get(name) for name in weak_ids],
        teacher,
        run.rewards.score,
        answers=practice.teacher_answers,
        show_gold=practice.teacher_show_gold,
        concurrency=practice.teacher_concurrency,
        budget=practice.teacher_budget,
        vote_share=practice.teacher_vote,
        stopped=faults.terminating,
    )
    ledger.set_cursor(phase, {"missing": result.missing})
    answers = ledger.teacher_answers(phase)
    kept = sum(answer.kept for answer in answers)
    refused = [answer.error for answer in answers if not answer.text]
    line = f"{phase}: teacher {teacher.model} asked {result.asked} times, {kept} answers verified and kept"
    if refused:
        line += f"; {len(refused)} requests refused, the first: {refused[0]}"
    if result.missing:
        line += f"; {result.missing} samples without all their answers: {result.reason}"
    run.say(line)


def fill_gaps(run: Run) -> None:
    """On resume: ask again for teacher answers that earlier phases had to end without."""

    def ask() -> None:
        for row in run.ledger.phases():
            if row.kind == "weakness" and row.state == "done" and row.cursor.get("missing"):
                ask_teacher(run, row.name)

    run.exchange.from_rank0(ask)


def teacher_of(run: Run, horizon: float | None) -> Teacher | None:
    """The configured teacher; as frames it's shown the very ones that the model saw under `horizon`."""
    decoding = threading.Lock()

    def frames(sample: Sample) -> list[np.ndarray]:
        with decoding:
            plans = [run.processor.plan_of(medium, horizon) for medium in sample.media]
            return [run.processor.decoder(plan).permute(0, 2, 3, 1).numpy() for plan in plans]

    return make_teacher(run.config.practice, frames, os.environ.get(KEY_VARIABLE, ""), run.template.instructions)


def finish(run: Run, phase: PhasePlan, reason: str) -> None:
    """Mark a phase done that changed no weights: the ledger holds all of it."""
    if run.exchange.rank == 0:
        run.ledger.finish_phase(phase.name, 0, reason)
    run.exchange.barrier()
