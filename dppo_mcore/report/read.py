"""Reading a run folder: the ledger, read-only and while it is written, and the metrics file.

Only the ledger's documented tables are used, so a report can be made on any machine that has Python, PyYAML and, for
pictures, PyAV, Pillow and NumPy: torch isn't needed.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


class ReportError(RuntimeError):
    """The report can't be made; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    folder: Path
    ledger: sqlite3.Connection
    phases: dict[int, str]
    """Name by integer key, in order of the schedule."""
    as_of_copy: bool = False
    """Whether the ledger was locked, and its copy as of the last finished phase is read."""

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        return self.ledger.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()


def open_run(folder: Path) -> Run:
    """Open RUN/ledger.sqlite for reading; the run may be going on, and leaves a copy where it locks readers out."""
    path, copy = folder / "ledger.sqlite", folder / "ledger.copy.sqlite"
    if not path.exists():
        raise ReportError(f"no {path}: give the folder of a run (what --run was set to)")
    try:
        return _opened(folder, path, copy)
    except sqlite3.DatabaseError as error:
        raise ReportError(_refusal(path, error)) from error


def _opened(folder: Path, path: Path, copy: Path) -> Run:
    try:
        ledger, version = _open(path, 1.0 if copy.exists() else 30.0)
        as_of_copy = False
    except sqlite3.OperationalError as error:
        if "locked" not in str(error) or not copy.exists():
            raise
        ledger, version = _open(copy, 30.0)
        as_of_copy = True
    if version is None or int(version[0]) != SCHEMA_VERSION:
        raise ReportError(f"{path} has schema {version and version[0]}, this report reads {SCHEMA_VERSION}")
    # One snapshot for all queries, however much a running job writes meanwhile.
    ledger.execute("BEGIN")
    phases = dict(ledger.execute("SELECT key, name FROM phases ORDER BY key"))
    return Run(folder, ledger, phases, as_of_copy)


@contextmanager
def reading(folder: Path) -> Iterator[Run]:
    """An opened run for as long as it is read; damage that shows only then is one line too."""
    run = open_run(folder)
    try:
        yield run
    except sqlite3.DatabaseError as error:
        raise ReportError(_refusal(folder / "ledger.sqlite", error)) from error
    finally:
        run.close()


def _refusal(path: Path, error: sqlite3.DatabaseError) -> str:
    """Why a ledger can't be read, and what to do."""
    if "locked" in str(error):
        advice = "the run that writes it keeps it to itself until its first phase is done"
    elif _wants_to_write(error):
        advice = "its folder can't be written and the ledger isn't closed; make the report of a copy of the folder"
    elif isinstance(error, sqlite3.OperationalError):
        advice = "is it a run's ledger?"
    else:
        advice = f"it is damaged, or no ledger; `sqlite3 {path.name} .recover` gives what is left of one"
    return f"{path} can't be read ({error}); {advice}"


def _wants_to_write(error: sqlite3.DatabaseError) -> bool:
    """Whether SQLite failed at making a file of its own beside the ledger."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


def _open(path: Path, patience: float) -> tuple[sqlite3.Connection, tuple[str] | None]:
    """The ledger, and the version it has."""
    try:
        return _connect(path, "mode=ro", patience)
    except sqlite3.OperationalError as error:
        # Readers share an index of the write-ahead log, which can't be made in a folder that is read-only. A ledger
        # without a log is whole by itself.
        log = path.with_name(path.name + "-wal")
        if not _wants_to_write(error) or (log.exists() and log.stat().st_size):
            raise
    return _connect(path, "mode=ro&immutable=1", patience)


def _connect(path: Path, how: str, patience: float) -> tuple[sqlite3.Connection, tuple[str] | None]:
    ledger = sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True, timeout=patience, check_same_thread=False)
    try:
        return ledger, ledger.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
    except BaseException:
        ledger.close()
        raise


def text_of(stored: str | bytes) -> str:
    """Text as the ledger keeps it: short ones as they are, longer ones compressed."""
    return stored if isinstance(stored, str) else zlib.decompress(stored).decode("utf-8", "replace")


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of RUN/metrics.jsonl; a last line cut off by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def state_token(folder: Path) -> str:
    """Changes whenever the run has written something, and only then: readers leave an empty log beside the ledger."""
    stats = []
    for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.copy.sqlite", "metrics.jsonl"):
        with suppress(FileNotFoundError):
            stats.append((folder / name).stat())
    return "-".join(f"{stat.st_size:x}.{stat.st_mtime_ns:x}" for stat in stats if stat.st_size)
