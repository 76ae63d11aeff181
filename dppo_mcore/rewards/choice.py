"""Answers that name one of several options, by letter or by its text; shared by several objectives."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from dppo_mcore.rewards.extraction import canonical, choice_letter, normalise
from dppo_mcore.types import Sample


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
    """1 for the right option: by letter where the gold answer is one, else by its text after normalisation."""
    options = options_of(sample)
    gold = normalise(str(sample.gold)).strip()
    by_text = {canonical(text): letter for letter, text in options.items()}
    said = canonical(answer)
    if len(gold) > 1 and canonical(gold) in by_text:
        gold = by_text[canonical(gold)]
    if not (len(gold) == 1 and gold.isalpha()):
        lettered = gold[:1].isupper() and gold[1:2] in (".", ")", ":")
        if not lettered:
            return float(said == canonical(gold) != "")
        gold = gold[0]
    if said in by_text and len(said) > 1:
        return float(by_text[said] == gold.upper())
    return float(choice_letter(answer, "".join(options) or "ABCDEFGH") == gold.upper())
