"""Answers that name one of several options, by letter or by its text; shared by several objectives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from dppo_mcore.rewards.extraction import OUTER, choice_letter, comparable, normalise, plain
from dppo_mcore.types import Sample

_MARKED = re.compile(r"[(\[]?([A-Za-z0-9]{1,3})[.):\]](?:\s|$)")


def options_of(sample: Sample) -> dict[str, str]:
    """Options by letter, from `extras["options"]`: a mapping, or a list ("A. text" or bare texts)."""
    options: Any = sample.extras.get("options")
    if isinstance(options, Mapping):
        return {str(letter).strip().upper(): str(text) for letter, text in options.items()}
    table: dict[str, str] = {}
    for letter, option in zip(ascii_uppercase, options or (), strict=False):
        text = str(option).strip()
        table[letter] = text[2:].strip() if text[:1] == letter and text[1:2] in (".", ")", ":") else text
    return table


def choice_reward(sample: Sample, answer: str) -> float:
    """1 for the gold answer itself, or for the option that it is, by letter or by text."""
    gold = normalise(str(sample.gold)).strip()
    if comparable(answer) == comparable(gold) != "":
        return 1.0
    options = options_of(sample)
    right = _named(gold, options) or _letter(gold)
    if right is None:
        return 0.0
    return float((_named(answer, options) or choice_letter(answer, "".join(options) or "ABCDEFGH")) == right)


def _named(text: str, options: Mapping[str, str]) -> str | None:
    """Letter of the option that a whole text names: by its letter, else by its text, else by the letter it opens with.

    A letter is one only if an option has it. Where an option's text is another one's letter, it's read as the letter.
    """
    bare, said = plain(text), comparable(text)
    alone = bare.strip(OUTER).upper()
    if alone in options:
        return alone
    for letter, option in options.items():
        if comparable(option) == said != "":
            return letter
    marked = _MARKED.match(bare)
    return marked.group(1).upper() if marked and marked.group(1).upper() in options else None


def _letter(gold: str) -> str | None:
    """The letter that a gold answer is or opens with ("B. blue block"), whatever the options."""
    marked = len(gold) == 1 or gold[1:2] in (".", ")", ":") and gold[0].isupper()
    return gold[0].upper() if marked and gold[0].isalpha() else None
