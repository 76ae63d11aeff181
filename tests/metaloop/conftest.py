"""A world and an unbroken run on it, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.metaloop import harness


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tabletop."""
    return harness.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def unbroken(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end, its rollouts written beside it."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    harness.finish(harness.command(world, run, dump_rollouts=run.with_name("rollouts")), run.with_suffix(".log"))
    return run
