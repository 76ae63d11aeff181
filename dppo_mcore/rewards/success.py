"""Task success evaluation: yes or no."""

from __future__ import annotations

import re

from dppo_mcore.rewards.registry import objective
from dppo_mcore.types import Sample

_VERDICT = re.compile(r"(?:(\bnot|n't)\s{1,3})?\b(yes|no|true|false)\b", re.IGNORECASE)


def _verdict(text: str) -> bool | None:
    found = _VERDICT.search(text)
    if found is None:
        return None
    denied, word = found.groups()
    return (word.lower() in ("yes", "true")) is (denied is None)


@objective("success")
def success(sample: Sample, answer: str) -> float:
    """First yes or no (true or false, "not true") of the answer."""
    gold = sample.gold if isinstance(sample.gold, bool) else _verdict(str(sample.gold))
    if gold is None:
        raise ValueError(f"gold of success sample {sample.id!r} is neither yes nor no: {sample.gold!r}")
    return float(_verdict(answer) is gold)
