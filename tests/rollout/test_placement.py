"""Which accelerators an engine runs on."""

from __future__ import annotations

import pytest

from dppo_mcore.rollout.base import EngineError
from dppo_mcore.rollout.placement import Seat, engine_devices, visible


def seats(nodes: int, ranks: int) -> list[Seat]:
    """As torchrun numbers them."""
    return [Seat(f"node-{node}", rank) for node in range(nodes) for rank in range(ranks)]


def all_devices(placement: str, where: list[Seat], replicas: list[tuple[int, ...]], size: int) -> list[tuple[int, ...]]:
    """Of every replica's engine."""
    return [engine_devices(placement, where, replicas, index, size) for index in range(len(replicas))]  # type: ignore[arg-type]


def test_colocated_engines_take_their_own_replicas_accelerators() -> None:
    """Also where pipeline stages spread a replica over the node; of one on two nodes, those of the leader's."""
    pipelined = [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert all_devices("colocated", seats(1, 8), pipelined, 4) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert all_devices("colocated", seats(1, 8), pipelined, 2) == [(0, 1), (2, 3)]
    assert all_devices("colocated", seats(2, 2), [(0, 1, 2, 3)], 2) == [(0, 1)]
    with pytest.raises(EngineError, match="rollout_tensor_parallel_size: 4 is above the 2"):
        all_devices("colocated", seats(2, 2), [(0, 1, 2, 3)], 4)


def test_disjoint_engines_share_nothing_with_the_trainer_or_each_other() -> None:
    """They follow the trainer's ranks on their leader's node, in the order of leaders."""
    assert all_devices("disjoint", seats(1, 4), [(0, 1, 2, 3)], 4) == [(4, 5, 6, 7)]
    assert all_devices("disjoint", seats(1, 4), [(0, 1), (2, 3)], 2) == [(4, 5), (6, 7)]
    across = [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 10, 11)]
    assert all_devices("disjoint", seats(3, 4), across, 2) == [(4, 5), (6, 7), (4, 5)]


def test_numbers_become_what_the_process_sees() -> None:
    """A node may be shared with others; one too small is said so."""
    assert visible((4, 5), "", 8) == "4,5"
    assert visible((1, 2), "3, 5,GPU-7", 3) == "5,GPU-7"
    with pytest.raises(EngineError, match="GPU number 5 of its node, which has 4"):
        visible((4, 5), "", 4)
