"""A run of which next to no data can be used ends, and says why, instead of finishing on nothing."""

from __future__ import annotations

from collections.abc import Mapping

from dppo_mcore.data.messages import use_of
from dppo_mcore.data.quarantine import Damage
from dppo_mcore.metaloop.run import Run
from dppo_mcore.runtime.errors import UserError

SHARE = 0.1
"""Of what is asked for, at least this must be usable."""
ENOUGH = 32
"""So many unusable samples in a row are no chance."""


def set_aside(run: Run, asked: Mapping[str, str], horizon: float | None, learnt: bool = False) -> dict[str, Damage]:
    """Those of the asked samples (pools by id) that a replica has in its quarantine, on rank 0. Collective.

    They were asked for at `horizon`, as questions or to be `learnt`: what is too long for others isn't counted.
    """
    quarantine, use = run.source.quarantine, use_of(horizon, learnt)
    mine = [
        (entry.sample_id, entry)
        for entry in quarantine.entries()
        if (pool := asked.get(entry.sample_id)) and quarantine.of(run.pools[pool].get(entry.sample_id), use) == entry
    ]
    return dict(run.exchange.at_rank0(mine))


def described(damaged: Mapping[str, Damage], asked: int) -> str:
    """How many of the asked samples are set aside, and the first of them."""
    return f"{len(damaged)} of {asked} samples can't be used, the first: {next(iter(damaged.values()))}"


def nothing_usable(run: Run, what: str, damaged: Mapping[str, Damage], asked: int) -> UserError:
    """The end of the run, in one line."""
    return UserError(
        f"{what}: {described(damaged, asked)} (all of them: {run.folder}/quarantine-*.jsonl); is media_root right? "
        "Mend what is wrong and run the same command again: samples whose files have come, moved or changed are tried "
        "again, others once those quarantine files are deleted"
    )


def require(run: Run, what: str, ids: list[str], horizon: float | None, least: int = 1) -> None:
    """End the run unless enough of the RL pool's samples `ids` could be used; of fewer than `least` none need be."""
    damaged = set_aside(run, dict.fromkeys(ids, "rl"), horizon)
    if not damaged:
        return
    if len(ids) >= least and len(ids) - len(damaged) < SHARE * len(ids):
        raise nothing_usable(run, what, damaged, len(ids))
    run.say(f"{what}: {described(damaged, len(ids))}")
