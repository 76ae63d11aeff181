"""General questions: exact match after normalisation; numbers compare by value."""

from __future__ import annotations

import re

from dppo_mcore.rewards.choice import choice_reward
from dppo_mcore.rewards.extraction import plain
from dppo_mcore.rewards.registry import objective
from dppo_mcore.types import Sample

_WHOLE_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?:\.\d{1,300})?")


def _value(text: str) -> float | None:
    text = plain(text[:4096]).strip(" .")
    return float(text.replace(",", "")) if _WHOLE_NUMBER.fullmatch(text) else None


@objective("exact")
def exact(sample: Sample, answer: str) -> float:
    """1 where the answer is the gold answer (one of them, if gold is a list)."""
    golds = sample.gold if isinstance(sample.gold, list | tuple) else [sample.gold]
    said = _value(answer)
    for gold in golds:
        value = float(gold) if isinstance(gold, int | float) else _value(str(gold))
        if value is not None:
            if said == value:
                return 1.0
        elif choice_reward(_with_gold(sample, gold), answer):
            return 1.0
    return 0.0


def _with_gold(sample: Sample, gold: object) -> Sample:
    return Sample(sample.id, sample.objective, (), gold=gold, extras=sample.extras)
