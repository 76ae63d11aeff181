"""Where a run stands: checkpoints inside and at the end of phases, and finding the place again after a kill.

The ledger marks a phase done only after the checkpoint of its end is complete. So on resume the newest checkpoint
is the end of the last finished phase, or lies inside the running one; steps after it are trained again on the
rollouts that the ledger recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dppo_mcore.learn import checkpoint
from dppo_mcore.metaloop.evaluation import evaluate, flat_metrics
from dppo_mcore.metaloop.run import Run
from dppo_mcore.runtime import faults


@dataclass(frozen=True)
class Position:
    """A phase and how many of its steps are behind us, on the whole run's step axis at `run_step`."""

    phase: str = ""
    phase_step: int = 0
    run_step: int = 0


def save(run: Run, phase: str, phase_step: int, score: float | None = None) -> None:
    """Checkpoint the present state as (phase, phase_step)."""
    run.saver.save(run.learner, run.step, asdict(Position(phase, phase_step, run.step)), score)


def save_if_due(run: Run, phase: str, phase_step: int, score: float | None = None) -> None:
    """Checkpoint every `save_interval` steps and at the best evaluation so far; on SIGTERM at once, and end the run."""
    run.saver.poll()
    if faults.stop_requested():
        save(run, phase, phase_step, score)
        run.saver.finish()
        raise faults.Preempted
    if phase_step % run.config.output.save_interval == 0 or _is_best(run, score):
        save(run, phase, phase_step, score)


def score_of(run: Run, results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """An evaluation's value of `best_metric`; None where that was not measured."""
    return flat_metrics(results).get(run.config.output.best_metric)


def evaluate_saved(run: Run, phase: str, phase_step: int) -> None:
    """Evaluate the weights of a checkpoint that was written before, and let it know its score."""
    score = score_of(run, evaluate(run, phase, phase_step))
    if score is not None:
        run.saver.rate(asdict(Position(phase, phase_step, run.step)), score)


def evaluate_inside(run: Run, phase: str, phase_step: int) -> float | None:
    """Evaluate where the phase goes on. After a stop there is no score: the resumed run evaluates first."""
    try:
        return score_of(run, evaluate(run, phase, phase_step))
    except faults.Preempted:
        return None


def _is_best(run: Run, score: float | None) -> bool:
    """Whether no checkpoint has as high a score."""
    if score is None:
        return False

    def look() -> bool:
        highest = checkpoint.best(run.saver.folder)
        return highest is None or score > checkpoint.read_meta(highest)["score"]

    run.saver.finish()
    return run.exchange.from_rank0(look)


def finish_phase(run: Run, phase: str, phase_step: int, reason: str) -> None:
    """Checkpoint the end of a phase, evaluate it, then mark the phase done."""
    # A phase without steps ends with the weights it began with, and those have their checkpoint.
    if phase_step and not _is_saved(run, Position(phase, phase_step, run.step)):
        save(run, phase, phase_step)  # first: what ends a long evaluation costs no step
    run.saver.finish()
    evaluate_saved(run, phase, phase_step)
    damaged = run.exchange.at_rank0(list(run.source.quarantine.entries()))
    if run.exchange.rank == 0:
        for entry in damaged:
            run.ledger.quarantine(entry.path or entry.sample_id, entry.sample_id, entry.reason)
        run.ledger.finish_phase(phase, phase_step, reason)
    run.exchange.barrier()


def _is_saved(run: Run, position: Position) -> bool:
    """Whether the newest checkpoint is this very position: writing it again would open a gap for a kill."""

    def look() -> bool:
        newest = checkpoint.latest(run.saver.folder)
        return newest is not None and checkpoint.read_meta(newest)["extra"] == asdict(position)

    run.saver.finish()
    return run.exchange.from_rank0(look)


def find_again(run: Run) -> Position:
    """Load the newest checkpoint of the run, or `--load`'s weights, or leave the model's own; where that is."""
    newest = run.exchange.from_rank0(lambda: str(checkpoint.latest(run.saver.folder) or ""))
    if newest:
        position = Position(**checkpoint.load(run.learner, Path(newest)))
        run.step = position.run_step
        run.say(f"resumed from {newest}: {position.phase}, {position.phase_step} steps done")
        return position
    if run.config.run.load:
        checkpoint.load(run.learner, Path(run.config.run.load), weights_only=True)
        run.say(f"weights from {run.config.run.load}")
    return Position()


def stop_if_asked(run: Run) -> None:
    """Between chunks of rollouts, which the ledger holds: nothing to save, so a SIGTERM ends the run at once."""
    if faults.stop_requested():
        raise faults.Preempted
