"""The deadline of tests."""

from __future__ import annotations

import time
from concurrent.futures import Future

import pytest

from tests.support.deadline import OverdueError, deadline


def test_a_wait_without_end_is_ended_with_all_stacks(capfd: pytest.CaptureFixture[str]) -> None:
    """Also one on a lock; a block in time is left alone, and no alarm stays behind."""
    with deadline(30, "short"):
        pass
    with pytest.raises(OverdueError, match="waiting: still running after 0 s"), deadline(0.2, "waiting"):
        Future().result()
    assert "test_deadline.py" in capfd.readouterr().err
    time.sleep(0.3)
