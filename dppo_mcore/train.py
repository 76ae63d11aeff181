"""The metaloop, top to bottom: RL reveals what the model can't do, SFT repairs it, clips grow, and round again.

    torchrun --nproc-per-node N -m dppo_mcore.train --config FILE [flags]

The same command goes on from wherever it was stopped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dppo_mcore import config_checks
from dppo_mcore.config import Config
from dppo_mcore.config_loading import load_or_exit
from dppo_mcore.runtime import faults
from dppo_mcore.runtime.log import start_logging


def train(config: Config) -> None:
    """Run every phase of the plan that isn't done yet."""
    from dppo_mcore.metaloop import evaluation, measuring, position, rl_phase, sft_phase
    from dppo_mcore.metaloop.plan import next_phase, plan_phases
    from dppo_mcore.metaloop.run import close_run, open_run
    from dppo_mcore.metaloop.weights import rest

    run = open_run(config)
    rest(run)
    if config.run.note:
        run.say(config.run.note)
    plan_phases(run)
    place = position.find_again(run)
    measuring.fill_gaps(run)
    while (phase := next_phase(run)) is not None:
        done = place.phase_step if place.phase == phase.name else 0
        if phase.kind != "base-sft":
            evaluation.evaluate_start(run, phase.name)
        match phase.kind:
            case "base-sft":
                sft_phase.make_base(run, phase, done)
            case "buffer":
                measuring.fill_buffer(run, phase)
            case "rl":
                rl_phase.practise(run, phase, done)
            case "weakness":
                measuring.find_weaknesses(run, phase)
            case "sft":
                sft_phase.study(run, phase, done)
        if run.exchange.rank == 0:
            run.ledger.publish()
    run.say(f"finished; report: python -m dppo_mcore.report {run.folder}")
    close_run(run)


def main() -> None:
    """Check the configuration, then train so that a failing rank ends the whole job."""
    config = load_or_exit(sys.argv[1:], "python -m dppo_mcore.train", __doc__ or "")
    config_checks.check_or_exit(config)

    def guarded() -> None:
        start_logging(Path(config.run.run), int(os.environ.get("RANK", "0")))
        train(config)

    faults.run_guarded(guarded)


if __name__ == "__main__":
    main()
