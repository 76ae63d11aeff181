"""Reading a run folder: the ledger, read-only and while it is written, and the metrics file.

Only the ledger's documented tables are used, so a report can be made on any machine that has Python and PyAV.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
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

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        return self.ledger.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()


def open_run(folder: Path) -> Run:
    """Open RUN/ledger.sqlite for reading; the run may be going on."""
    path = folder / "ledger.sqlite"
    if not path.exists():
        raise ReportError(f"no {path}: give the folder of a run (what --run was set to)")
    ledger = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30, check_same_thread=False)
    try:
        version = ledger.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
    except sqlite3.OperationalError as error:
        raise ReportError(
            f"{path} can't be read ({error}); copy it with sqlite3 .backup and report on the copy"
        ) from error
    if version is None or int(version[0]) != SCHEMA_VERSION:
        raise ReportError(f"{path} has schema {version and version[0]}, this report reads {SCHEMA_VERSION}")
    # One snapshot for all queries, however much a running job writes meanwhile.
    ledger.execute("BEGIN")
    phases = dict(ledger.execute("SELECT key, name FROM phases ORDER BY key"))
    return Run(folder, ledger, phases)


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
    """Changes whenever the run has written something."""
    names = ("ledger.sqlite", "ledger.sqlite-wal", "metrics.jsonl")
    stats = [(folder / name).stat() for name in names if (folder / name).exists()]
    return "-".join(f"{stat.st_size:x}.{stat.st_mtime_ns:x}" for stat in stats)
