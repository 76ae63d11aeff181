"""The schedule: which phases a run goes through, in order, and how long its clips may be.

A full loop k is: buffer, RL ("k-1 RL"), weakness, SFT ("k-2 SFT"). The last loop of the paper's figure ends on its RL
phase; `last_sft` adds the other half. Making a run longer appends to the schedule and changes none of its phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dppo_mcore.practice.ledger import PhasePlan

Mode = Literal["dppo", "rl-only", "sft-only", "single-loop"]
BASE = "base SFT"


def rl_name(loop: int) -> str:
    """Name of a loop's RL phase."""
    return f"{loop}-1 RL"


def sft_name(loop: int) -> str:
    """Name of a loop's SFT phase."""
    return f"{loop}-2 SFT"


def buffer_name(loop: int) -> str:
    """Name of the phase that scores the pool for a loop."""
    return f"{loop}-1 buffer"


def weakness_name(loop: int) -> str:
    """Name of the phase that mines weaknesses, asks the teacher and makes a loop's corpus."""
    return f"{loop}-2 weakness"


def horizon(loop: int, horizons: Sequence[float]) -> float:
    """Longest clip in seconds of a loop (from 1); the last value holds for later loops."""
    if not horizons:
        raise ValueError("horizons must name at least one clip length in seconds")
    return horizons[min(loop, len(horizons)) - 1]


def schedule(
    mode: Mode, loops: int, horizons: Sequence[float], *, last_sft: bool = False, base_sft: bool = False
) -> list[PhasePlan]:
    """Phases of a run in order.

    `rl-only` has a buffer and an RL phase per loop; `sft-only` mines and tunes per loop without any RL; `single-loop`
    is one whole loop, SFT included.
    """
    if loops < 1:
        raise ValueError(f"loops must be >= 1, got {loops}")
    phases = [PhasePlan(BASE, 0, "base-sft", horizon(1, horizons))] if base_sft else []
    if mode == "single-loop":
        loops, last_sft = 1, True
    for loop in range(1, loops + 1):
        seconds = horizon(loop, horizons)
        if mode != "sft-only":
            phases.append(PhasePlan(buffer_name(loop), loop, "buffer", seconds))
            phases.append(PhasePlan(rl_name(loop), loop, "rl", seconds))
        if mode == "sft-only" or (mode != "rl-only" and (loop < loops or last_sft)):
            phases.append(PhasePlan(weakness_name(loop), loop, "weakness", seconds))
            phases.append(PhasePlan(sft_name(loop), loop, "sft", seconds))
    return phases
