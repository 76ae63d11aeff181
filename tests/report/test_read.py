"""Opening a run where nothing may be written, and one whose ledger is damaged."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dppo_mcore.practice.ledger import Ledger, PhasePlan
from dppo_mcore.report.__main__ import main
from dppo_mcore.report.blocks import Limits
from dppo_mcore.report.page import build
from dppo_mcore.report.read import ReportError, open_run, state_token

NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into; pytest's own are their owner's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def reading_only(folder: Path) -> Iterator[None]:
    """Inside, this process may read a folder and write nothing there; permissions don't bind root, so it isn't root."""
    was_root = os.geteuid() == 0
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    if was_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        folder.chmod(0o755)


def plan_only(folder: Path) -> Ledger:
    """A ledger that holds a plan, still open."""
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.plan([PhasePlan("1-1 RL", 1, "rl", 32.0)])
    return ledger


def test_a_finished_run_is_read_where_nothing_can_be_written(open_folder: Path) -> None:
    run = open_folder / "run"
    plan_only(run).close()
    assert not (run / "ledger.sqlite-wal").exists()
    with reading_only(run):
        with pytest.raises(OSError):
            (run / "new").touch()
        opened = open_run(run)
        assert opened.phases == {1: "1-1 RL"}
        opened.close()


def test_a_report_that_cannot_be_written_says_how_it_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_only(tmp_path).close()
    assert main([str(tmp_path), "--out", str(tmp_path / "absent" / "report.html")]) == 1
    assert "--out FILE puts the report elsewhere" in capsys.readouterr().err


def test_an_open_ledger_is_not_read_without_its_log(open_folder: Path) -> None:
    run, copy = open_folder / "run", open_folder / "copy"
    copy.mkdir()
    with plan_only(run):
        for name in ("ledger.sqlite", "ledger.sqlite-wal"):
            shutil.copy(run / name, copy / name)
    assert (copy / "ledger.sqlite-wal").stat().st_size > 0
    with reading_only(copy), pytest.raises(ReportError, match="the ledger isn't closed; make the report of a copy"):
        open_run(copy)
    opened = open_run(copy)
    assert opened.phases == {1: "1-1 RL"}
    opened.close()


def test_a_file_that_is_no_ledger_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no ledger at all " * 400)
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "it is damaged, or no ledger" in error


def test_damage_that_shows_only_while_reading_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_only(tmp_path).close()
    file = tmp_path / "ledger.sqlite"
    ledger = sqlite3.connect(file)
    size = ledger.execute("PRAGMA page_size").fetchone()[0]
    root = ledger.execute("SELECT rootpage FROM sqlite_master WHERE name = 'success'").fetchone()[0]
    ledger.close()
    content = bytearray(file.read_bytes())
    content[(root - 1) * size : root * size] = b"\xff" * size
    file.write_bytes(content)
    open_run(tmp_path).close()
    with pytest.raises(ReportError, match="malformed"):
        build(tmp_path, Limits(frame_samples=0))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_reading_a_run_is_no_news_of_it(tmp_path: Path) -> None:
    with plan_only(tmp_path) as ledger:
        ledger.decide("1-1 RL", 1, "stagnation", {}, "")
    before = state_token(tmp_path)
    open_run(tmp_path).close()
    assert (tmp_path / "ledger.sqlite-wal").exists() and state_token(tmp_path) == before
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.decide("1-1 RL", 2, "stagnation", {}, "")
        assert state_token(tmp_path) != before
    assert state_token(tmp_path) != before
