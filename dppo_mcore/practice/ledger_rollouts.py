"""Rollouts in the ledger: written once, a step in one transaction, and read back exactly as they were."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dppo_mcore.practice.ledger_base import LedgerBase, clean, to_json
from dppo_mcore.types import Rollout, ScoredRollout

PLAIN_TEXT_BYTES = 160
"""Shorter texts gain nothing from compression."""

PAYLOAD = "p.text, p.token_ids, p.logprobs, p.parts, p.versions, p.error"


@dataclass(frozen=True, slots=True)
class Group:
    """Success counts of one sample at one step."""

    step: int
    sample_id: str
    objective: str
    trials: int
    successes: int


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """A rollout and where it happened, for reports and exports."""

    phase: str
    step: int
    scored: ScoredRollout
    written_at: float


def pack_text(text: str) -> str | bytes:
    """TEXT as it is where short, else a compressed BLOB."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) <= PLAIN_TEXT_BYTES and raw.decode("utf-8", "replace") == text:
        return text
    return zlib.compress(raw, 1)


def unpack_text(stored: str | bytes) -> str:
    """Inverse of `pack_text`."""
    return stored if isinstance(stored, str) else zlib.decompress(stored).decode("utf-8", "surrogatepass")


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids in 2 or 4 bytes each."""
    ids_T = np.asarray(ids, dtype=np.int64)
    return ids_T.astype("<u2" if ids_T.size and 0 <= ids_T.min() and ids_T.max() < 65536 else "<i4").tobytes()


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """Log-probs in 4 bytes each, or 8 where 4 would change a value (a replayed step must see the same numbers)."""
    wide_T = np.asarray(logprobs, dtype="<f8")
    with np.errstate(over="ignore"):
        narrow_T = wide_T.astype("<f4")
    return (narrow_T if np.array_equal(narrow_T.astype("<f8"), wide_T) else wide_T).tobytes()


def unpack_numbers(blob: bytes, count: int, types: dict[int, str]) -> tuple[Any, ...]:
    """Numbers from a blob whose length tells their width."""
    return tuple(np.frombuffer(blob, dtype=types[len(blob) // count]).tolist()) if count else ()


class RolloutRecords(LedgerBase):
    """Writing and reading rollouts and success rates."""

    def record_rollouts(self, phase: str, step: int, scored: Iterable[ScoredRollout]) -> int:
        """Write answers of one step in one transaction; returns how many were new.

        The key is (phase, step, sample, index): what is there already stays, so writing again after a kill is safe.
        Success counts of the touched groups are written with them.
        """
        phase_key = self.phase_key(phase)
        with self.transaction():
            known = set(
                self.connection.execute(
                    "SELECT sample, idx FROM rollouts WHERE phase = ? AND step = ?", (phase_key, step)
                )
            )
            next_key = 1 + (self.connection.execute("SELECT max(key) FROM rollouts").fetchone()[0] or 0)
            rows, payloads, now = [], [], time.time()
            for one in scored:
                rollout = one.rollout
                key = (self.sample_key(rollout.sample_id), rollout.index)
                if key in known:
                    continue
                known.add(key)
                rows.append(
                    (next_key, phase_key, step, *key, one.reward, one.parts.get("task", one.reward), int(one.success),
                     len(rollout.token_ids), rollout.finish_reason, now)
                )  # fmt: skip
                payloads.append(
                    (next_key, pack_text(rollout.text), pack_ids(rollout.token_ids), pack_logprobs(rollout.logprobs),
                     to_json(dict(one.parts)), to_json(rollout.weight_versions),
                     None if one.error is None else clean(one.error))
                )  # fmt: skip
                next_key += 1
            self.connection.executemany("INSERT INTO rollouts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self.connection.executemany("INSERT INTO payloads VALUES (?, ?, ?, ?, ?, ?, ?)", payloads)
            counts: dict[int, list[int]] = {}
            for row in rows:
                count = counts.setdefault(row[3], [0, 0])
                count[0] += 1
                count[1] += row[7]
            self.connection.executemany(
                "INSERT INTO success VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "trials = trials + excluded.trials, successes = successes + excluded.successes",
                [(phase_key, step, sample, *count) for sample, count in counts.items()],
            )
        return len(rows)

    def rollouts(self, phase: str, step: int) -> dict[str, list[ScoredRollout]]:
        """Recorded answers of a step by sample id, each group in order of index."""
        groups: dict[str, list[ScoredRollout]] = {}
        for row in self._read("WHERE r.phase = ? AND r.step = ? ORDER BY r.sample, r.idx", self.phase_key(phase), step):
            groups.setdefault(row.scored.rollout.sample_id, []).append(row.scored)
        return groups

    def rollouts_of(self, sample_id: str) -> list[RolloutRow]:
        """Every answer ever given to a sample, in order of writing."""
        return list(self._read("WHERE r.sample = ? ORDER BY r.key", self.sample_key(sample_id)))

    def verified(self, sample_id: str) -> tuple[str, str, int] | None:
        """(text, phase, step) of the sample's best verified answer: well formed, newest, then shortest; or None."""
        row = self.connection.execute(
            "SELECT p.text, h.name, r.step FROM rollouts r JOIN payloads p USING (key) "
            "JOIN phases h ON h.key = r.phase WHERE r.sample = ? AND r.success AND r.finish = 'stop' "
            "AND json_extract(p.parts, '$.format') >= 1 "
            "ORDER BY r.phase DESC, r.step DESC, r.tokens, r.idx LIMIT 1",
            (self.sample_key(sample_id),),
        ).fetchone()
        return None if row is None else (unpack_text(row[0]), row[1], row[2])

    def all_rollouts(self, phase: str | None = None) -> Iterator[RolloutRow]:
        """Stream of all answers (of a phase), in order of writing."""
        if phase is None:
            return self._read("ORDER BY r.key")
        return self._read("WHERE r.phase = ? ORDER BY r.step, r.sample, r.idx", self.phase_key(phase))

    def _read(self, where: str, *values: Any) -> Iterator[RolloutRow]:
        cursor = self.connection.execute(
            "SELECT h.name, r.step, s.id, r.idx, r.reward, r.success, r.tokens, r.finish, r.written_at, "
            f"{PAYLOAD} FROM rollouts r JOIN payloads p USING (key) JOIN samples s ON s.key = r.sample "
            f"JOIN phases h ON h.key = r.phase {where}",
            values,
        )
        for name, step, sample_id, index, reward, success, tokens, finish, at, *payload in cursor:
            text, ids, logprobs, parts, versions, error = payload
            rollout = Rollout(
                sample_id=sample_id,
                index=index,
                token_ids=unpack_numbers(ids, tokens, {2: "<u2", 4: "<i4"}) if ids is not None else (),
                logprobs=unpack_numbers(logprobs, tokens, {4: "<f4", 8: "<f8"}) if logprobs is not None else (),
                text=unpack_text(text),
                finish_reason=finish,
                weight_versions=tuple((v[0], v[1], v[2]) for v in json.loads(versions)),
            )
            yield RolloutRow(name, step, ScoredRollout(rollout, reward, json.loads(parts), bool(success), error), at)

    def recorded(self, phase: str, step: int) -> set[tuple[str, int]]:
        """(sample id, index) of the answers a step has already."""
        return set(
            self.connection.execute(
                "SELECT s.id, r.idx FROM rollouts r JOIN samples s ON s.key = r.sample "
                "WHERE r.phase = ? AND r.step = ?",
                (self.phase_key(phase), step),
            )
        )

    def groups(self, phase: str, before_step: int | None = None) -> list[Group]:
        """Success counts of a phase by step and sample, in order of step; all that stagnation and difficulty need."""
        rows = self.connection.execute(
            "SELECT u.step, s.id, s.objective, u.trials, u.successes FROM success u JOIN samples s ON s.key = u.sample "
            "WHERE u.phase = ? AND u.step < ? ORDER BY u.step, u.sample",
            (self.phase_key(phase), 2**62 if before_step is None else before_step),
        )
        return [Group(*row) for row in rows]

    def success_rates(self, phases: Collection[str] | None = None) -> dict[str, tuple[int, int]]:
        """(trials, successes) per sample over the given phases (all by default)."""
        where, values = "", []
        if phases is not None:
            values = [self.phase_key(name) for name in phases]
            where = f"WHERE u.phase IN ({', '.join('?' * len(values))})"
        rows = self.connection.execute(
            "SELECT s.id, sum(u.trials), sum(u.successes) FROM success u JOIN samples s ON s.key = u.sample "
            f"{where} GROUP BY u.sample ORDER BY u.sample",
            values,
        )
        return {sample_id: (trials, successes) for sample_id, trials, successes in rows}

    def task_histogram(self, phases: Collection[str], bins: int = 20) -> dict[str, list[int]]:
        """Per objective, how many answers had a task reward in each of `bins` equal parts of [0, 1]."""
        keys = [self.phase_key(name) for name in phases]
        rows = self.connection.execute(
            "SELECT s.objective, min(CAST(r.task * ? AS INTEGER), ? - 1), count(*) FROM rollouts r "
            f"JOIN samples s ON s.key = r.sample WHERE r.phase IN ({', '.join('?' * len(keys))}) GROUP BY 1, 2",
            (bins, bins, *keys),
        )
        table: dict[str, list[int]] = {}
        for objective, place, count in rows:
            table.setdefault(objective, [0] * bins)[place] = count
        return table

    def rethreshold(self, threshold: float) -> None:
        """Count success anew as task reward >= threshold, over everything recorded."""
        with self.transaction():
            self.connection.execute("UPDATE rollouts SET success = task >= ?", (threshold,))
            self.connection.execute("DELETE FROM success")
            self.connection.execute(
                "INSERT INTO success SELECT phase, step, sample, count(*), sum(success) FROM rollouts GROUP BY 1, 2, 3"
            )

    def last_tries(self, phases: Collection[str] | None = None) -> dict[str, int]:
        """Per sample, the number of the last group it was rolled out in (larger is more recent)."""
        chosen = self._phase_keys if phases is None else {name: self.phase_key(name) for name in phases}
        rows = self.connection.execute(
            "SELECT s.id, max(u.phase * 1000000000 + u.step) FROM success u JOIN samples s ON s.key = u.sample "
            f"WHERE u.phase IN ({', '.join(map(str, chosen.values()))}) GROUP BY u.sample"
        )
        return dict(rows)

    def drop_tokens(self, phase: str) -> int:
        """Free the token ids and log-probs of a finished phase (texts and rewards stay); returns how many rollouts."""
        done = self.connection.execute(
            "UPDATE payloads SET token_ids = NULL, logprobs = NULL WHERE key IN "
            "(SELECT key FROM rollouts WHERE phase = ?)",
            (self.phase_key(phase),),
        )
        return done.rowcount
