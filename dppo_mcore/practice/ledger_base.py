"""Connection, transactions, and the names behind the ledger's integer keys: samples and phases."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dppo_mcore.practice.ledger_schema import LedgerError, WriterLock, connect
from dppo_mcore.types import Sample


@dataclass(frozen=True)
class PhasePlan:
    """One phase of the schedule."""

    name: str
    loop: int
    kind: str
    horizon: float | None = None
    """Longest clip in seconds."""


@dataclass(frozen=True)
class PhaseRow:
    """A phase as the ledger knows it."""

    name: str
    loop: int
    kind: str
    horizon: float | None
    state: str
    """planned, running or done."""
    start_step: int | None
    end_step: int | None
    cursor: Mapping[str, Any]
    """Where the phase stands, for its own use."""
    reason: str
    """Why it ended."""
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True)
class SampleRow:
    """What the ledger keeps of a sample, so that a report needs no manifest."""

    id: str
    pool: str
    objective: str
    dimension: str
    source: str
    question: str
    gold: Any
    answer: str | None
    media: tuple[Mapping[str, Any], ...]


COPY_SUFFIX = ".copy.sqlite"
"""Of the copy for readers, `ledger.copy.sqlite`."""
SAMPLE_BATCH = 4096
"""Samples held in memory while a large manifest is registered."""


def _row_of(sample: Sample, pool: str) -> tuple[Any, ...]:
    question = "\n".join(turn.content for turn in sample.turns if turn.role == "user")
    media = [{"kind": m.kind, "path": m.path, "start": m.start, "end": m.end} for m in sample.media]
    gold = None if sample.gold is None else to_json(sample.gold)
    answer = None if sample.answer is None else clean(sample.answer)
    return (
        sample.id, pool, sample.objective, sample.dimension, sample.source, clean(question), gold, answer,
        to_json(media),
    )  # fmt: skip


def differences(one: Sample, other: Sample) -> list[str]:
    """What makes two samples of one id two: of objective, question, gold and media those that differ."""
    return _differences(_compared(_row_of(one, "")), _compared(_row_of(other, "")))


def _compared(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return row[2], row[5], row[6], row[8]


def _differences(one: tuple[Any, ...], other: tuple[Any, ...]) -> list[str]:
    """Media count by file name and window: a media root may move."""
    if one == other:
        return []
    pairs = zip(
        ("objective", "question", "gold", "media"),
        (*one[:3], _windows(one[3])),
        (*other[:3], _windows(other[3])),
        strict=True,
    )
    return [name for name, mine, theirs in pairs if mine != theirs]


def _windows(media: str) -> list[tuple[Any, ...]]:
    return [(m["kind"], m["path"].rsplit("/", 1)[-1], m["start"], m["end"]) for m in json.loads(media)]


def _sample_row(values: tuple[Any, ...]) -> SampleRow:
    return SampleRow(*values)


def _phase_row(values: tuple[Any, ...]) -> PhaseRow:
    return PhaseRow(*values)


def to_json(value: Any) -> str:
    """Canonical JSON; what JSON doesn't know is written as its string."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), default=str)


def clean(text: str) -> str:
    """Text that UTF-8 can hold (lone surrogates replaced)."""
    return text.encode("utf-8", "replace").decode("utf-8")


class LedgerBase:
    """Opened ledger. With `write=True` it's the only writer; readers may come and go meanwhile."""

    def __init__(self, path: str | Path, *, write: bool = True, file_system: str | None = None) -> None:
        self.path = Path(path)
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = WriterLock(self.path) if write else None
        try:
            self.connection: sqlite3.Connection = connect(self.path, write=write, kind=file_system)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise
        self._depth = 0
        self._phase_keys: dict[str, int] = {}
        self._sample_keys: dict[str, int] = {}
        self._read_keys()

    def _read_keys(self) -> None:
        self._phase_keys = dict(self.connection.execute("SELECT name, key FROM phases"))
        self._sample_keys = dict(self.connection.execute("SELECT id, key FROM samples"))

    def close(self) -> None:
        """Close the file and let another writer in."""
        self.connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> LedgerBase:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; nests, and the outermost commits."""
        if self._depth:
            yield
            return
        self.connection.execute("BEGIN IMMEDIATE")
        self._depth = 1
        try:
            yield
        except BaseException:
            self.connection.execute("ROLLBACK")
            self._read_keys()
            raise
        else:
            self.connection.execute("COMMIT")
        finally:
            self._depth = 0

    def backup(self, path: str | Path) -> None:
        """A consistent copy, while the run goes on."""
        target = sqlite3.connect(path)
        with target:
            self.connection.backup(target)
        target.close()

    def publish(self) -> Path | None:
        """Where the file's lock keeps readers out, leave a copy for them; its path, or None where they can read."""
        if self.connection.execute("PRAGMA locking_mode").fetchone()[0] != "exclusive":
            return None
        copy = self.path.with_name(self.path.stem + COPY_SUFFIX)
        unfinished = copy.with_name(f".{copy.name}")
        unfinished.unlink(missing_ok=True)
        self.backup(unfinished)
        return unfinished.replace(copy)

    def integrity(self) -> str:
        """SQLite's own check; "ok" where all is well."""
        return str(self.connection.execute("PRAGMA integrity_check").fetchone()[0])

    # Samples.

    def add_samples(self, samples: Iterable[Sample], pool: str) -> int:
        """Register samples of a pool ("rl", "general", "eval", ...); returns how many were new.

        A sample known already must be the same: a changed manifest under an old run would mix two experiments.
        """
        before, stream = len(self._sample_keys), iter(samples)
        with self.transaction():
            while batch := list(islice(stream, SAMPLE_BATCH)):
                self._add_batch([_row_of(sample, pool) for sample in batch], pool)
        return len(self._sample_keys) - before

    def _add_batch(self, rows: list[tuple[Any, ...]], pool: str) -> None:
        for row in rows:
            if row[0] not in self._sample_keys:
                cursor = self.connection.execute(
                    "INSERT INTO samples (id, pool, objective, dimension, source, question, gold, answer, media) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
                self._sample_keys[row[0]] = cursor.lastrowid or 0
                continue
            stored = self.connection.execute(
                "SELECT objective, question, gold, media FROM samples WHERE key = ?", (self._sample_keys[row[0]],)
            ).fetchone()
            if found := _differences(stored, _compared(row)):
                raise LedgerError(
                    f"sample {row[0]!r} of pool {pool!r} differs from the one recorded under this id in {self.path} "
                    f"({', '.join(found)}): give it an id of its own, or start a new run"
                )

    def samples(self, pool: str | None = None) -> dict[str, SampleRow]:
        """Registered samples by id, in order of registration."""
        where, values = ("WHERE pool = ?", (pool,)) if pool is not None else ("", ())
        rows = self.connection.execute(
            "SELECT id, pool, objective, dimension, source, question, gold, answer, media FROM samples "
            f"{where} ORDER BY key",
            values,
        )
        return {
            row[0]: _sample_row((*row, None if gold is None else json.loads(gold), answer, tuple(json.loads(media))))
            for *row, gold, answer, media in rows
        }

    def sample_key(self, sample_id: str) -> int:
        """Integer behind a sample id."""
        try:
            return self._sample_keys[sample_id]
        except KeyError:
            raise LedgerError(f"sample {sample_id!r} is not in {self.path}: register it by add_samples") from None

    # Phases.

    def plan(self, phases: Sequence[PhasePlan]) -> None:
        """Write the schedule; known phases stay as they are, so a longer schedule extends a finished run."""
        with self.transaction():
            self.connection.executemany(
                "INSERT OR IGNORE INTO phases (name, loop, kind, horizon) VALUES (?, ?, ?, ?)",
                [(p.name, p.loop, p.kind, p.horizon) for p in phases],
            )
            self._phase_keys = dict(self.connection.execute("SELECT name, key FROM phases"))

    def phases(self) -> list[PhaseRow]:
        """The schedule in order."""
        rows = self.connection.execute(
            "SELECT name, loop, kind, horizon, state, start_step, end_step, cursor, reason, started_at, ended_at "
            "FROM phases ORDER BY key"
        )
        return [_phase_row((*row[:7], json.loads(row[7]), *row[8:])) for row in rows]

    def phase(self, name: str) -> PhaseRow:
        """One phase."""
        self.phase_key(name)
        return next(phase for phase in self.phases() if phase.name == name)

    def phase_key(self, name: str) -> int:
        """Integer behind a phase's name."""
        if name not in self._phase_keys:
            raise LedgerError(f"phase {name!r} is not in the plan of {self.path}")
        return self._phase_keys[name]

    def start_phase(self, name: str, step: int) -> bool:
        """Mark a phase as running from `step`; False if it ran already (a resumed run)."""
        done = self.connection.execute(
            "UPDATE phases SET state = 'running', start_step = ?, started_at = ? WHERE key = ? AND state = 'planned'",
            (step, time.time(), self.phase_key(name)),
        )
        return done.rowcount == 1

    def finish_phase(self, name: str, step: int, reason: str = "") -> bool:
        """Mark a phase as done at `step`; False if it was."""
        done = self.connection.execute(
            "UPDATE phases SET state = 'done', end_step = ?, reason = ?, ended_at = ? WHERE key = ? "
            "AND state = 'running'",
            (step, reason, time.time(), self.phase_key(name)),
        )
        return done.rowcount == 1

    def set_cursor(self, name: str, cursor: Mapping[str, Any]) -> None:
        """Remember where a phase stands."""
        self.connection.execute(
            "UPDATE phases SET cursor = ? WHERE key = ?", (to_json(dict(cursor)), self.phase_key(name))
        )
