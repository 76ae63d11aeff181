"""The phases of a run, written to the ledger once; a longer plan extends a finished run."""

from __future__ import annotations

from dppo_mcore.metaloop.run import Run
from dppo_mcore.practice import curriculum
from dppo_mcore.practice.ledger import PhasePlan


def phases_of(run: Run) -> list[PhasePlan]:
    """The whole plan of this configuration, in order."""
    config = run.config
    return curriculum.schedule(
        config.run.mode,
        config.run.loops,
        config.practice.horizons,
        last_sft=config.run.last_sft,
        base_sft=config.sft.base_sft_steps > 0,
    )


def plan_phases(run: Run) -> None:
    """Put the plan into the ledger."""
    if run.exchange.rank == 0:
        run.ledger.plan(phases_of(run))
    run.exchange.barrier()


def next_phase(run: Run) -> PhasePlan | None:
    """The first phase that isn't done, marked as running; None at the end."""

    def choose() -> PhasePlan | None:
        for row in run.ledger.phases():
            if row.state != "done":
                run.ledger.start_phase(row.name, run.step)
                return PhasePlan(row.name, row.loop, row.kind, row.horizon)
        return None

    return run.exchange.from_rank0(choose)
