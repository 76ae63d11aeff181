"""Samples and their rollouts: an index that the page searches, and details in compressed blocks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dppo_mcore.report.packing import WRAPPING, Packer, pack
from dppo_mcore.report.read import Run, text_of

MOST_TEXT = 20_000
"""Characters of one answer that are shown; the ledger keeps all of it."""
SEARCHED = 1000
"""Characters of a question that the page's filter searches."""
SNIPPET = 110
"""Characters of it that the list shows; as many are searched however many questions there are."""
INDEX_SHARE = 0.2
"""Of the file's size, for the questions of the index."""
PLACE_BYTES = 3
"""Room for the number of a sample's block in the index."""
PICTURE_SHARE = 0.2
"""Of the room beside the index, at most kept for pictures."""
PICTURE_BYTES = 60_000
"""Room kept for one sample's pictures."""


@dataclass(frozen=True)
class Limits:
    """Bounds on what one file holds."""

    rollouts: int = 100_000
    """The newest so many rollouts are in the file."""
    megabytes: float = 150.0
    """Size of the whole file: details of samples and then pictures are left out where it would be larger, and the page
    says so. Figures and the index of all samples are always in it."""
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


def _rollouts(run: Run, sample: int, oldest: int) -> list[list[Any]]:
    """A sample's rollouts from a key on, in order of age."""
    rows = run.rows(
        "SELECT r.phase, r.step, r.idx, r.reward, r.success, r.tokens, r.finish, p.parts, p.versions, p.error, p.text "
        "FROM rollouts r JOIN payloads p USING (key) WHERE r.sample = ? AND r.key >= ? ORDER BY r.key",
        sample,
        oldest,
    )
    return [
        [run.phases[phase], step, index, round(reward, 4), success, tokens, finish, json.loads(parts),
         json.loads(versions), error, _shorten(text_of(text))]
        for phase, step, index, reward, success, tokens, finish, parts, versions, error, text in rows
    ]  # fmt: skip


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
        "evaluation": _by_sample([(*row[:6], json.loads(row[6]), _shorten(row[7])) for row in answers]),
        "teacher": _by_sample([(*row[:7], _shorten(row[7])) for row in teacher]),
        "corpus": _by_sample([(*row[:5], _shorten(row[5])) for row in items]),
    }


@dataclass
class SampleBlocks:
    """The page's sample browser: an index in columns and blocks of details."""

    index: dict[str, Any]
    blocks: list[str]
    keys: list[int]
    """Ledger key of each indexed sample."""
    rollouts_total: int
    rollouts_older: int
    """Left out as older than the newest ones asked for."""
    rollouts_shown: int
    bare: int
    """Samples whose details are left out for the file's size."""


def sample_blocks(run: Run, limits: Limits, room: float | None = None) -> SampleBlocks:
    """Index and blocks of every sample that was rolled out, taught or evaluated, in `room` bytes.

    Where these don't hold all details, those of held-out samples come first, as every figure of success rests on them;
    then what the teacher was asked about, then what a corpus is made of, then the rest, each in order of the pools.
    """
    newest, total = run.rows("SELECT max(key), count(*) FROM rollouts")[0]
    oldest = max(0, (newest or 0) - limits.rollouts + 1)
    recent = dict(run.rows("SELECT sample, count(*) FROM rollouts WHERE key >= ? GROUP BY sample", oldest))
    attached, rates = _attachments(run), _rates(run)
    keys = sorted(set(recent).union(rates, *attached.values()))
    index = _index(run, keys, limits)
    index["rollouts"] = [recent.get(key, 0) for key in keys]
    index |= {name: [int(key in attached[name]) for key in keys] for name in ("teacher", "corpus")}
    used = [name for name in run.phases.values() if any(name in rates[key] for key in keys)]
    index["rates"] = {name: [rates[key].get(name, [0, 0]) for key in keys] for name in used}

    room = limits.megabytes * 1e6 if room is None else room
    packer = Packer(_room_for_details(run, room - len(pack(index)) - WRAPPING, keys, limits))
    for place in _in_order_of_rank(keys, attached):
        if packer.full:
            break
        key = keys[place]
        extra = {name: by[key] for name, by in attached.items() if key in by}
        packer.add(place, _details(run, key) | {"rollouts": _rollouts(run, key, oldest)} | extra)
    packer.flush()
    index["block"] = [packer.number.get(place, -1) for place in range(len(keys))]
    return SampleBlocks(
        index=index,
        blocks=packer.blocks,
        keys=keys,
        rollouts_total=total,
        rollouts_older=total - sum(recent.values()),
        rollouts_shown=sum(index["rollouts"][place] for place in packer.number),
        bare=len(keys) - len(packer.number),
    )


def _rates(run: Run) -> dict[int, dict[str, list[int]]]:
    """[trials, successes] by sample and phase."""
    rates: dict[int, dict[str, list[int]]] = defaultdict(dict)
    for sample, phase, trials, successes in run.rows(
        "SELECT sample, phase, sum(trials), sum(successes) FROM success GROUP BY 1, 2"
    ):
        rates[sample][run.phases[phase]] = [trials, successes]
    return rates


def _room_for_details(run: Run, room: float, keys: Sequence[int], limits: Limits) -> float:
    """Bytes beside the index, less what its column of blocks and the pictures may take."""
    with_media = {key for (key,) in run.rows("SELECT key FROM samples WHERE media != '[]'")}
    pictured = min(limits.frame_samples, len(with_media.intersection(keys)))
    room -= PLACE_BYTES * len(keys)
    return room - min(PICTURE_BYTES * pictured, PICTURE_SHARE * room)


def _in_order_of_rank(keys: Sequence[int], attached: dict[str, dict[int, Any]]) -> list[int]:
    """Places of the samples: those of the first attachment, then of the next, then those without any."""
    ranks = [next((rank for rank, by in enumerate(attached.values()) if key in by), len(attached)) for key in keys]
    return sorted(range(len(keys)), key=ranks.__getitem__)


def _details(run: Run, key: int) -> dict[str, Any]:
    """What a manifest says about a sample."""
    question, gold, answer, media = run.rows("SELECT question, gold, answer, media FROM samples WHERE key = ?", key)[0]
    gold = None if gold is None else json.loads(gold)
    return {"q": question, "gold": gold, "answer": answer, "media": json.loads(media)}


def _index(run: Run, keys: Sequence[int], limits: Limits) -> dict[str, Any]:
    """What is known of the samples beforehand, in columns; words that repeat stand once."""
    searched = max(SNIPPET, min(SEARCHED, int(INDEX_SHARE * limits.megabytes * 1e6 / max(1, len(keys)))))
    names = ("id", "pool", "objective", "dimension", "source", "question")
    query = "SELECT key, id, pool, objective, dimension, source, substr(question, 1, ?) FROM samples ORDER BY key"
    chosen = set(keys)
    rows = [row[1:] for row in run.ledger.execute(query, (searched,)) if row[0] in chosen]
    by_name = dict(zip(names, map(list, zip(*rows, strict=True)) if rows else [[] for _ in names], strict=True))
    words: dict[str, list[str]] = {}
    for name in ("pool", "objective", "dimension", "source"):
        words[name] = sorted(set(by_name[name]))
        places = {word: k for k, word in enumerate(words[name])}
        by_name[name] = [places[word] for word in by_name[name]]
    return {"count": len(rows), "words": words, **by_name}
