"""The run's memory: every rollout, reward, decision, teacher answer, SFT item and evaluation, written once.

`Ledger(path)` is the source of truth for the method: difficulty, stagnation, weakness and corpus are functions of it,
and a run killed at any instant goes on from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from dppo_mcore.practice.ledger_base import PhasePlan, PhaseRow, SampleRow, clean, differences, to_json
from dppo_mcore.practice.ledger_rollouts import Group, RolloutRecords, RolloutRow, unpack_text
from dppo_mcore.practice.ledger_schema import LedgerError
from dppo_mcore.types import ScoredRollout

__all__ = ["Group", "Ledger", "LedgerError", "PhasePlan", "PhaseRow", "RolloutRow", "SampleRow", "differences"]

TIME_COLUMNS = {"written_at", "started_at", "ended_at"}
TABLES = {
    "samples": "id",
    "phases": "key",
    "rollouts": "phase, step, sample, idx",
    "success": "phase, step, sample",
    "buffers": "phase, sample",
    "decisions": "phase, step, kind",
    "teacher_answers": "phase, sample, round, idx",
    "sft_items": "phase, position",
    "evaluations": "phase, step, name",
    "evaluation_answers": "phase, step, name, sample, idx",
    "quarantine": "path",
}
"""Tables with the order of their natural keys."""


@dataclass(frozen=True)
class Decision:
    """Something the run decided, its numbers, and why."""

    phase: str
    step: int
    kind: str
    numbers: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class BufferRow:
    """What the buffer made of a sample."""

    sample_id: str
    status: str
    trials: int
    successes: int


@dataclass(frozen=True)
class TeacherAnswer:
    """One answer of the teacher, verified or refused."""

    sample_id: str
    round: int
    """0: the question alone; 1: with the gold answer shown."""
    index: int
    model: str
    text: str
    reward: float
    success: bool
    kept: bool
    error: str | None
    tokens: int


@dataclass(frozen=True)
class SftItem:
    """A conversation of the SFT corpus, and why it is there."""

    position: int
    sample_id: str
    source: str
    """weak, retrieved, own or general."""
    answer: str
    tokens: int
    why: str


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation."""

    phase: str
    step: int
    name: str
    metrics: Mapping[str, Any]


def _teacher_answer(values: tuple[Any, ...]) -> TeacherAnswer:
    return TeacherAnswer(*values)


class Ledger(RolloutRecords):
    """See the module; rollouts are in `RolloutRecords`, samples and phases in `LedgerBase`."""

    def __enter__(self) -> Ledger:
        return self

    def decide(self, phase: str, step: int, kind: str, numbers: Mapping[str, Any], reason: str) -> bool:
        """Record a decision with its numbers; False if it's there already."""
        done = self.connection.execute(
            "INSERT OR IGNORE INTO decisions VALUES (?, ?, ?, ?, ?, ?)",
            (self.phase_key(phase), step, kind, to_json(dict(numbers)), reason, time.time()),
        )
        return done.rowcount == 1

    def decisions(self, kind: str | None = None, phase: str | None = None) -> list[Decision]:
        """Decisions in order of phase and step."""
        rows = self.connection.execute(
            "SELECT h.name, d.step, d.kind, d.numbers, d.reason FROM decisions d JOIN phases h ON h.key = d.phase "
            "WHERE (?1 IS NULL OR d.kind = ?1) AND (?2 IS NULL OR h.name = ?2) ORDER BY d.phase, d.step, d.kind",
            (kind, phase),
        )
        return [Decision(name, step, what, json.loads(numbers), why) for name, step, what, numbers, why in rows]

    def record_buffer(self, phase: str, rows: Iterable[BufferRow]) -> None:
        """What became of each sample when the buffer was made."""
        key = self.phase_key(phase)
        with self.transaction():
            self.connection.executemany(
                "INSERT OR IGNORE INTO buffers VALUES (?, ?, ?, ?, ?)",
                [(key, self.sample_key(r.sample_id), r.status, r.trials, r.successes) for r in rows],
            )

    def buffer(self, phase: str) -> list[BufferRow]:
        """The buffer made for a phase."""
        rows = self.connection.execute(
            "SELECT s.id, b.status, b.trials, b.successes FROM buffers b JOIN samples s ON s.key = b.sample "
            "WHERE b.phase = ? ORDER BY b.sample",
            (self.phase_key(phase),),
        )
        return [BufferRow(*row) for row in rows]

    def record_teacher(self, phase: str, answers: Iterable[TeacherAnswer]) -> int:
        """Write teacher answers; returns how many were new."""
        key, now = self.phase_key(phase), time.time()
        with self.transaction():
            before = self.connection.total_changes
            self.connection.executemany(
                "INSERT OR IGNORE INTO teacher_answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (key, self.sample_key(a.sample_id), a.round, a.index, a.model, clean(a.text), a.reward,
                     int(a.success), int(a.kept), a.error and clean(a.error), a.tokens, now)
                    for a in answers
                ],
            )  # fmt: skip
            return self.connection.total_changes - before

    def keep_teacher(self, phase: str, kept: Iterable[tuple[str, int, int]]) -> None:
        """Mark the answers (sample id, round, index) chosen for the corpus, and only those."""
        key = self.phase_key(phase)
        with self.transaction():
            self.connection.execute("UPDATE teacher_answers SET kept = 0 WHERE phase = ?", (key,))
            self.connection.executemany(
                "UPDATE teacher_answers SET kept = 1 WHERE phase = ? AND sample = ? AND round = ? AND idx = ?",
                [(key, self.sample_key(sample_id), round_, index) for sample_id, round_, index in kept],
            )

    def teacher_answers(self, phase: str | None = None, sample_id: str | None = None) -> list[TeacherAnswer]:
        """Teacher answers in order of phase, sample, round and index."""
        rows = self.connection.execute(
            "SELECT s.id, t.round, t.idx, t.model, t.text, t.reward, t.success, t.kept, t.error, t.tokens "
            "FROM teacher_answers t JOIN samples s ON s.key = t.sample "
            "WHERE (?1 IS NULL OR t.phase = ?1) AND (?2 IS NULL OR t.sample = ?2) "
            "ORDER BY t.phase, t.sample, t.round, t.idx",
            (
                None if phase is None else self.phase_key(phase),
                None if sample_id is None else self.sample_key(sample_id),
            ),
        )
        return [_teacher_answer((*row[:6], bool(row[6]), bool(row[7]), *row[8:])) for row in rows]

    def record_corpus(self, phase: str, items: Sequence[SftItem]) -> None:
        """Write the corpus of an SFT phase, once and whole."""
        key = self.phase_key(phase)
        with self.transaction():
            self.connection.executemany(
                "INSERT OR IGNORE INTO sft_items VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (key, i.position, self.sample_key(i.sample_id), i.source, clean(i.answer), i.tokens, i.why)
                    for i in items
                ],
            )

    def corpus(self, phase: str) -> list[SftItem]:
        """The corpus of an SFT phase in order of position; empty if none was made yet."""
        rows = self.connection.execute(
            "SELECT i.position, s.id, i.source, i.answer, i.tokens, i.why FROM sft_items i "
            "JOIN samples s ON s.key = i.sample WHERE i.phase = ? ORDER BY i.position",
            (self.phase_key(phase),),
        )
        return [SftItem(*row) for row in rows]

    def record_evaluation(
        self, phase: str, step: int, name: str, metrics: Mapping[str, Any], answers: Iterable[ScoredRollout]
    ) -> None:
        """Write an evaluation with its answers, once and whole. `name` is the held-out set's."""
        key = self.phase_key(phase)
        with self.transaction():
            self.connection.execute(
                "INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?, ?)",
                (key, step, name, to_json(dict(metrics)), time.time()),
            )
            self.connection.executemany(
                "INSERT OR IGNORE INTO evaluation_answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (key, step, name, self.sample_key(a.rollout.sample_id), a.rollout.index, clean(a.rollout.text),
                     a.reward, a.parts.get("task", a.reward), int(a.success), len(a.rollout.token_ids),
                     a.rollout.finish_reason, to_json(dict(a.parts)), a.error and clean(a.error))
                    for a in answers
                ],
            )  # fmt: skip

    def evaluations(self) -> list[Evaluation]:
        """All evaluations in order of phase and step."""
        rows = self.connection.execute(
            "SELECT h.name, e.step, e.name, e.metrics FROM evaluations e JOIN phases h ON h.key = e.phase "
            "ORDER BY e.phase, e.step, e.name"
        )
        return [Evaluation(phase, step, name, json.loads(metrics)) for phase, step, name, metrics in rows]

    def evaluation_answers(self, phase: str, step: int, name: str) -> list[dict[str, Any]]:
        """Answers of one evaluation as rows: sample, idx, text, reward, task, success, tokens, finish, parts, error."""
        columns = ("sample", "idx", "text", "reward", "task", "success", "tokens", "finish", "parts", "error")
        rows = self.connection.execute(
            "SELECT s.id, a.idx, a.text, a.reward, a.task, a.success, a.tokens, a.finish, a.parts, a.error "
            "FROM evaluation_answers a JOIN samples s ON s.key = a.sample "
            "WHERE a.phase = ? AND a.step = ? AND a.name = ? ORDER BY a.sample, a.idx",
            (self.phase_key(phase), step, name),
        )
        return [dict(zip(columns, (*row[:8], json.loads(row[8]), row[9]), strict=True)) for row in rows]

    def quarantine(self, path: str, sample_id: str, reason: str) -> bool:
        """Remember a medium that can't be read; False if known."""
        done = self.connection.execute(
            "INSERT OR IGNORE INTO quarantine VALUES (?, ?, ?, ?)", (clean(path), sample_id, clean(reason), time.time())
        )
        return done.rowcount == 1

    def quarantined(self) -> dict[str, str]:
        """Reason by path of every medium set aside."""
        return dict(self.connection.execute("SELECT path, reason FROM quarantine ORDER BY path"))

    def dump(self, ignore_times: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every fact as (table, row) in canonical order: names for integers, wall times left out if asked.

        Two runs that did the same thing give the same sequence, whatever kills lay between.
        """
        for table, order in TABLES.items():
            yield from ((table, row) for row in self.table(table, order, ignore_times))

    def table(self, table: str, order: str, ignore_times: bool = False) -> Iterator[dict[str, Any]]:
        """Rows of one table with names for integers; rollouts come with their payload."""
        phases = {key: name for name, key in self._phase_keys.items()}
        samples = {key: name for name, key in self._sample_keys.items()}
        source = "rollouts JOIN payloads USING (key)" if table == "rollouts" else table
        cursor = self.connection.execute(f"SELECT * FROM {source} ORDER BY {order}")
        names = [column[0] for column in cursor.description]
        for values in cursor:
            row = dict(zip(names, values, strict=True))
            row.pop("key", None)
            if table == "rollouts":
                row["text"] = unpack_text(row["text"])
            if "phase" in row:
                row["phase"] = phases[row["phase"]]
            if isinstance(row.get("sample"), int):
                row["sample"] = samples[row["sample"]]
            yield {name: value for name, value in row.items() if not (ignore_times and name in TIME_COLUMNS)}

    def digest(self, ignore_times: bool = True) -> str:
        """One hash over `dump`: equal for a resumed run and an unbroken one."""
        total = sha256()
        for table, row in self.dump(ignore_times):
            total.update(repr((table, list(row.items()))).encode("utf-8", "surrogatepass"))
        return total.hexdigest()
