"""Which answers are still owed when some are recorded."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("have", "n", "expected"),
    [([], 3, [(0, 3)]), ([0, 1, 2], 3, []), ([0], 3, [(1, 2)]), ([1], 4, [(0, 1), (2, 2)]), ([5], 2, [(0, 2)])],
)
def test_owed(have: list[int], n: int, expected: list[tuple[int, int]]) -> None:
    from dppo_mcore.metaloop.rolling import owed

    assert owed(have, n) == expected
