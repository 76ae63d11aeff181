"""A process group with the engine's ranks, beside the trainer's own."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

GROUP = "dppo"
TIMEOUT = timedelta(minutes=5)


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(address: str, port: int, backend: str, rank: int, world_size: int) -> Any:
    """Meet the engine's ranks at `address:port`. Rank 0, the trainer's leader, hosts the store.

    torch has no public call for a group that reaches beyond the default one; this is the one engines use on their
    side too, so the store's keys agree.
    """
    from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

    store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=TIMEOUT)
    group, _ = _new_process_group_helper(
        world_size, rank, [], Backend(backend), PrefixStore(GROUP, store), group_name=GROUP, timeout=TIMEOUT
    )
    _world.pg_group_ranks[group] = {index: index for index in range(world_size)}
    return group


def broadcast(flat: Tensor, group: Any) -> None:
    """Rank 0 of `group` sends a uint8 buffer to the others."""
    dist.broadcast(flat, src=0, group=group)


def leave(group: Any) -> None:
    """Dissolve this side of a group."""
    if group is not None:
        dist.destroy_process_group(group)
