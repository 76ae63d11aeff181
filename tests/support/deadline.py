"""A hard limit on each part of a test: what would hang fails, with every thread's stack in its report."""

from __future__ import annotations

import faulthandler
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

LONG = {"slow", "kill"}
"""Markers of tests that may take longer."""


class OverdueError(AssertionError):
    """A test's deadline passed."""


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise `OverdueError` in this block once `seconds` have passed. For the main thread."""

    def ring(*_: object) -> None:
        print(f"{what}: still running after {seconds:.0f} s", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=2, all_threads=True)
        raise OverdueError(f"{what}: still running after {seconds:.0f} s; the stacks are in its captured stderr")

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Servers and ranks come up."""
    with deadline(900, f"set-up of {item.nodeid}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """The test itself."""
    with deadline(2400 if LONG & set(item.keywords) else 600, item.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Servers and ranks end."""
    with deadline(300, f"tear-down of {item.nodeid}"):
        return (yield)
