"""Samples and their rollouts as compressed blocks that the page opens one by one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dppo_mcore.report.packing import pack
from dppo_mcore.report.read import Run, text_of

ROLLOUTS_PER_BLOCK = 800
MOST_TEXT = 20_000
"""Characters of one answer that are shown; the ledger keeps all of it."""
SNIPPET = 110


@dataclass(frozen=True)
class Limits:
    """Bounds on what one file holds."""

    rollouts: int = 100_000
    """The newest so many rollouts are in the file."""
    megabytes: float = 130.0
    """Compressed size of all blocks together; what is beyond it is left out, and the page says so."""
    frame_samples: int = 300
    """Samples with pictures."""
    frame_seconds: float = 60.0
    """Time spent decoding pictures at most."""


def _shorten(text: str) -> str:
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT // 2] + "\n[…]\n" + text[-MOST_TEXT // 2 :]


def _by_sample(rows: list[tuple[Any, ...]]) -> dict[int, list[list[Any]]]:
    """Rows by their first column, without it."""
    found: dict[int, list[list[Any]]] = defaultdict(list)
    for sample, *rest in rows:
        found[sample].append(rest)
    return found


def _rollouts(run: Run, oldest: int) -> Iterator[tuple[int, list[Any]]]:
    """(sample, rollout) of all rollouts from a key on, in order of sample and age."""
    cursor = run.ledger.execute(
        "SELECT r.sample, r.phase, r.step, r.idx, r.reward, r.success, r.tokens, r.finish, p.parts, p.versions, "
        "p.error, p.text FROM rollouts r JOIN payloads p USING (key) WHERE r.key >= ? ORDER BY r.sample, r.key",
        (oldest,),
    )
    for sample, phase, step, index, reward, success, tokens, finish, parts, versions, error, text in cursor:
        yield sample, [run.phases[phase], step, index, round(reward, 4), success, tokens, finish, json.loads(parts),
                       json.loads(versions), error, _shorten(text_of(text))]  # fmt: skip


def _attachments(run: Run) -> dict[str, dict[int, list[list[Any]]]]:
    """Teacher answers, corpus items and evaluation answers by sample."""
    name = "(SELECT name FROM phases WHERE key = {}.phase)"
    teacher = run.rows(
        f"SELECT t.sample, {name.format('t')}, t.model, t.reward, t.success, t.kept, t.error, t.text "
        "FROM teacher_answers t ORDER BY t.sample, t.phase, t.round, t.idx"
    )
    items = run.rows(
        f"SELECT i.sample, {name.format('i')}, i.source, i.tokens, i.why, i.answer FROM sft_items i "
        "ORDER BY i.sample, i.phase, i.position"
    )
    answers = run.rows(
        f"SELECT a.sample, {name.format('a')}, a.step, a.name, a.reward, a.success, a.parts, a.text "
        "FROM evaluation_answers a ORDER BY a.sample, a.phase, a.step, a.idx"
    )
    return {
        "teacher": _by_sample([(*row[:7], _shorten(row[7])) for row in teacher]),
        "corpus": _by_sample([(*row[:5], _shorten(row[5])) for row in items]),
        "evaluation": _by_sample([(*row[:6], json.loads(row[6]), _shorten(row[7])) for row in answers]),
    }


@dataclass
class SampleBlocks:
    """The page's sample browser: an index in columns and blocks of details."""

    index: dict[str, Any]
    blocks: list[str]
    keys: list[int]
    """Ledger key of each indexed sample."""
    rollouts_shown: int
    rollouts_total: int


def sample_blocks(run: Run, limits: Limits) -> SampleBlocks:
    """Index and blocks of every sample that was rolled out, taught or evaluated."""
    newest, total = run.rows("SELECT max(key), count(*) FROM rollouts")[0]
    oldest = max(0, (newest or 0) - limits.rollouts + 1)
    attached = _attachments(run)
    table = {row[0]: row[1:] for row in run.rows(
        "SELECT key, id, pool, objective, dimension, source, question, gold, answer, media FROM samples")}  # fmt: skip
    rates: dict[int, dict[str, list[int]]] = defaultdict(dict)
    for sample, phase, trials, successes in run.rows(
        "SELECT sample, phase, sum(trials), sum(successes) FROM success GROUP BY 1, 2"
    ):
        rates[sample][run.phases[phase]] = [trials, successes]

    packer = _Packer(limits.megabytes * 1e6)
    stream = _rollouts(run, oldest)
    pending = next(stream, None)
    for key in sorted(table):
        rollouts = []
        while pending is not None and pending[0] == key:
            rollouts.append(pending[1])
            pending = next(stream, None)
        extra = {name: by[key] for name, by in attached.items() if key in by}
        if rollouts or extra or key in rates:
            identity, pool, objective, dimension, source, question, gold, answer, media = table[key]
            packer.add(key, {"q": question, "gold": None if gold is None else json.loads(gold), "answer": answer,
                             "media": json.loads(media), "rollouts": rollouts, **extra},
                       [identity, pool, objective, dimension, source, question[:SNIPPET], rates.get(key, {}),
                        len(rollouts), int("teacher" in extra), int("corpus" in extra)])  # fmt: skip
    packer.flush()
    return SampleBlocks(packer.columns(list(run.phases.values())), packer.blocks, packer.keys, packer.rollouts, total)


class _Packer:
    """Fills blocks until the size bound; afterwards samples keep their place in the index without details."""

    def __init__(self, most_bytes: float) -> None:
        self.blocks: list[str] = []
        self.keys: list[int] = []
        self.rollouts = 0
        self._rows: list[list[Any]] = []
        self._block: dict[int, Any] = {}
        self._weight = 0
        self._left = most_bytes

    def add(self, key: int, details: dict[str, Any], row: list[Any]) -> None:
        """Take in one sample."""
        full = self._left <= 0
        place = len(self.keys)
        self.keys.append(key)
        self._rows.append([*row, -1 if full else len(self.blocks)])
        if full:
            return
        self._block[place] = details
        self._weight += 1 + len(details["rollouts"])
        self.rollouts += len(details["rollouts"])
        if self._weight >= ROLLOUTS_PER_BLOCK:
            self.flush()

    def flush(self) -> None:
        """Close the block being filled."""
        if self._block:
            self.blocks.append(pack(self._block))
            self._left -= len(self.blocks[-1])
            self._block, self._weight = {}, 0

    def columns(self, phases: list[str]) -> dict[str, Any]:
        """The index in columns; words that repeat stand once."""
        words: dict[str, list[str]] = {}
        columns: dict[str, Any] = {"count": len(self._rows), "words": words}
        names = ("id", "pool", "objective", "dimension", "source", "question", "rates", "rollouts", "teacher", "corpus",
                 "block")  # fmt: skip
        by_name = dict(zip(names, zip(*self._rows, strict=True) if self._rows else [()] * len(names), strict=True))
        for name in ("pool", "objective", "dimension", "source"):
            words[name] = sorted(set(by_name[name]))
            places = {word: k for k, word in enumerate(words[name])}
            columns[name] = [places[word] for word in by_name[name]]
        for name in ("id", "question", "rollouts", "teacher", "corpus", "block"):
            columns[name] = list(by_name[name])
        used = [name for name in phases if any(name in rates for rates in by_name["rates"])]
        columns["rates"] = {name: [rates.get(name, [0, 0]) for rates in by_name["rates"]] for name in used}
        return columns
