"""Ordered lists in answers, and how well two orders agree."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

from dppo_mcore.rewards.extraction import canonical, normalise

MAX_ITEMS = 512
_SEPARATORS = re.compile(r"\n|->|=>|→|⇒|>|;|\\rightarrow|\\to\b")
_NUMBERED = re.compile(r"(?:^|(?<=\s))(?:step\s{0,3})?\d{1,3}\s?[.):](?=[\sA-Za-z])", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*•]|(?:step\s*)?\d{1,3}\s?[.):-]|\((?:\d{1,3}|[a-z])\)|[a-z]\))\s*", re.IGNORECASE)
_MARK = re.compile(r"\s*\(?(\d{1,3}|[A-Za-z])\)\s*")
_CAPITALS = re.compile(r"(?<![A-Za-z])[A-Z](?![a-z])|(?<=[A-Z])[A-Z]")
_ALONE = re.compile(r"(?<![A-Za-z0-9'])[A-Za-z](?![A-Za-z0-9'])")
_FENCE = re.compile(r"```[A-Za-z]{0,16}")
_THEN = re.compile(r",?\s?\b(?:and then|then|next|finally|after that)\b,?", re.IGNORECASE)


def gold_items(gold: Sequence[Any]) -> tuple[list[str], bool]:
    """A gold list's items in canonical form, and whether all are single letters."""
    texts = [normalise(str(item)) for item in gold]
    items = [_item(text) or canonical(text) for text in texts]
    return items, all(len(item) == 1 and item.isalpha() for item in items)


def ordered_items(answer: str, letters: bool = False) -> list[str]:
    """Items of a list in order, in canonical form: JSON, lines, numbers, arrows or commas. At most `MAX_ITEMS`.

    `letters`: the items are single letters, so where the list doesn't fall apart into such, "BCA" and "B-C-A" are
    lists too.
    """
    answer = _FENCE.sub("", answer).strip()
    if answer.startswith(("[", "{")):
        try:
            parsed = json.loads(answer)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict) and len(parsed) == 1:
            (parsed,) = parsed.values()
        if isinstance(parsed, list):
            return [text for item in parsed[:MAX_ITEMS] if (text := _item(str(item)))]
        answer = answer.strip("[]")
    parts = _SEPARATORS.split(_NUMBERED.sub("\n", answer))
    if sum(bool(part.strip()) for part in parts) <= 1:
        parts = _THEN.sub(",", answer).split(",")
    if letters and any(sum(map(str.isalnum, part)) > 1 for part in parts):
        return _letters(answer)
    return list(islice(filter(None, map(_item, parts)), MAX_ITEMS))


def _item(text: str) -> str:
    """Canonical form without a bullet or number in front; a mark that stands alone ("(b)", "2)") is the item."""
    text = text[:2048]
    mark = _MARK.fullmatch(text)
    return canonical(mark.group(1) if mark else _BULLET.sub("", text))


def _letters(answer: str) -> list[str]:
    """Letters that stand alone or in a run of capitals; small ones count where there aren't two capitals."""
    found = _CAPITALS.findall(answer)
    return [letter.lower() for letter in (found if len(found) > 1 else _ALONE.findall(answer))[:MAX_ITEMS]]


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest sequence found in both in this order."""
    row = [0] * (len(right) + 1)
    for item in left:
        before = 0
        for j, other in enumerate(right, 1):
            above = row[j]
            row[j] = before + 1 if item == other else max(above, row[j - 1])
            before = above
    return row[-1]


def pair_agreement(said: Sequence[str], gold: Sequence[str]) -> float:
    """Share of the gold order's pairs that `said` has in that order: (tau + 1) / 2 for a permutation of gold.

    A pair with a missing item doesn't agree; of an item said twice the first counts.
    """
    place: dict[str, int] = {}
    for index, item in enumerate(said):
        place.setdefault(item, index)
    pairs = [(a, b) for i, a in enumerate(gold) for b in gold[i + 1 :]]
    if not pairs:
        return float(list(said) == list(gold))
    return sum(a in place and b in place and place[a] < place[b] for a, b in pairs) / len(pairs)
