"""A run killed at any instant ends, resumed, with the weights of the unbroken one."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.learn import kill_run


def start(model: str, run: Path, optimizer: str) -> Any:
    run.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.learn.kill_run"])
    process = context.Process(target=kill_run.main, args=(model, str(run), optimizer))
    process.start()
    return process


def finish(model: str, run: Path, optimizer: str) -> dict[str, Any]:
    process = start(model, run, optimizer)
    process.join(timeout=240)
    assert process.exitcode == 0
    return json.loads((run / "final.json").read_text())


def kill_and_resume(model: str, folder: Path, optimizer: str, kills: int) -> None:
    began = time.monotonic()
    unbroken = finish(model, folder / "unbroken", optimizer)
    duration = time.monotonic() - began
    chance = random.Random(7)
    points = []
    for number in range(kills):
        run = folder / f"run{number}"
        process = start(model, run, optimizer)
        time.sleep(duration * (number + chance.random()) / kills)
        process.kill()
        process.join()
        steps = (run / "steps").read_text().split() if (run / "steps").is_file() else []
        points.append(len(steps))
        assert finish(model, run, optimizer) == unbroken, f"killed after step {len(steps)}"
    print("killed after steps", points)


def test_killed_twice(tiny_dir: str, tmp_path: Path) -> None:
    kill_and_resume(tiny_dir, tmp_path, "adam", 2)


@pytest.mark.kill
def test_killed_at_twenty_points(tiny_dir: str, tmp_path: Path) -> None:
    kill_and_resume(tiny_dir, tmp_path, "adam", 20)


@pytest.mark.kill
def test_muon_killed_at_five_points(tiny_dir: str, tmp_path: Path) -> None:
    kill_and_resume(tiny_dir, tmp_path, "muon", 5)
