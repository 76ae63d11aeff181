"""Which of a node's accelerators an engine runs on. Bookkeeping over all ranks of the job; no torch.

Colocated, an engine takes the accelerators of its replica's own ranks. Disjoint, the trainer's ranks have the first
accelerators of a node (as many as torchrun started ranks there) and the engines the next ones, each as many as it is
split over, in the order of their leaders.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dppo_mcore.rollout.base import EngineError

Placement = Literal["colocated", "disjoint"]


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank sits."""

    host: str
    local_rank: int


def host_name() -> str:
    """A name two ranks share exactly if they can map each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}"


def engine_devices(
    placement: Placement, seats: Sequence[Seat], replicas: Sequence[Sequence[int]], index: int, tensor_parallel: int
) -> tuple[int, ...]:
    """Local numbers of the accelerators that the engine of replica `index` runs on.

    `seats` are those of all ranks; `replicas` lists each replica's ranks, its leader first.
    """
    host = seats[replicas[index][0]].host
    if placement == "colocated":
        own = sorted(seats[rank].local_rank for rank in replicas[index] if seats[rank].host == host)
        if len(own) < tensor_parallel:
            raise EngineError(
                f"rollout_tensor_parallel_size: {tensor_parallel} is above the {len(own)} rank(s) the replica has on "
                "its leader's node; engines share their replica's accelerators"
            )
        return tuple(own[:tensor_parallel])
    first = 1 + max(seat.local_rank for seat in seats if seat.host == host)
    first += tensor_parallel * sum(seats[ranks[0]].host == host for ranks in replicas[:index])
    return tuple(range(first, first + tensor_parallel))


def visible(devices: Sequence[int], named: str, count: int) -> str:
    """CUDA_VISIBLE_DEVICES of an engine, out of the node's `count` and the trainer's own `named` (maybe empty)."""
    names = [name.strip() for name in named.split(",")] if named else [str(number) for number in range(count)]
    if max(devices) >= len(names):
        raise EngineError(
            f"rollout_placement: an engine needs GPU number {max(devices)} of its node, which has {len(names)}; "
            "start fewer ranks a node, or lower rollout_tensor_parallel_size"
        )
    return ",".join(names[number] for number in devices)
