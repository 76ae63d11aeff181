"""Whatever a model writes: no exception, rewards in [0, 1], bounded time."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dppo_mcore.rewards import known_objectives, score
from dppo_mcore.rewards.extraction import MAX_CHARACTERS, final_answer
from dppo_mcore.types import Sample

GOLDS: dict[str, Any] = {
    "affordance": [[0.1, 0.1], [0.5, 0.1], [0.5, 0.5]],
    "boxes": [0.1, 0.1, 0.5, 0.5],
    "counting": 7,
    "exact": "red block",
    "planning": ["pick up red", "place in box", "go home"],
    "prediction": "B",
    "success": "yes",
    "temporal": ["red", "blue", "green"],
}
SAMPLES = [Sample(name, name, (), gold=gold) for name, gold in GOLDS.items()]
SAMPLES += [
    Sample("letter", "temporal", (), gold="C", extras={"options": ["up", "down", "left"]}),
    Sample("pixels", "affordance", (), gold={"box": [10, 10, 50, 50]}, extras={"size": [100, 200]}),
    Sample("length", "counting", (), gold=1.5, extras={"unit": "m"}),
]
PIECES = [
    "<think>", "</think>", "</thought>", "<answer>", "</answer>", "\\boxed{", "}", "{", "\\frac{", "(", ")", "[", "]",
    ",", ".", "-", "->", "1", "0.5", "9" * 30, "1e", "e9", "1,234", "½", "７", "Ｂ", "A", "b)", "yes", "No", "one",
    "hundred", "and", "red", "\n", "1. ", "* ", " ", "\x00", "\ud800", "ﷺ", "İ", "$", "\\text{", "/", "10^", "cm", "−",
]  # fmt: skip


def check(text: str) -> None:
    for sample in SAMPLES:
        result = score(sample, text)
        assert result.error is None, (sample.id, text[:200], result.error)
        assert 0 <= result.reward <= 1 and all(0 <= part <= 1 for part in result.parts.values())


def test_all_objectives_are_covered() -> None:
    assert set(GOLDS) <= set(known_objectives())


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_any_text(text: str) -> None:
    check(text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_characters="<>\\"), max_size=50))
def test_tagged_answers_are_found(text: str) -> None:
    import unicodedata

    plain = unicodedata.normalize("NFKC", text)
    if "<" in plain or "\\" in plain:
        return
    assert final_answer(f"<think>3</think><answer>{text}</answer>") == final_answer(text)


ADVERSARIAL = [
    "<answer>" * 12_500, "</answer>" * 11_000, "<answer></answer>" * 6_000, "\\boxed{" * 14_000, "{" * 100_000,
    "\\boxed{" + "{}" * 50_000, "\\frac{1}{" * 11_000, "\\frac" * 20_000, "1" * 100_000, "1," * 50_000,
    "1,111" * 20_000,
    "(" * 100_000, "(1," * 33_000, "(1,1" * 25_000, "[0.5," * 20_000, "(0.1, 0.1)" * 10_000,
    "(0.1,0.1,0.9,0.9)" * 5_900,
    "-" * 100_000, "1. " * 33_000, "a\n" * 50_000, "-> " * 33_000, "step 1: " * 12_500, "then " * 20_000,
    "A " * 50_000, "a " * 50_000, "one " * 25_000, "hundred " * 12_500, "million " * 12_500, " " * 100_000,
    "\n" * 100_000,
    "**" * 50_000, "\\text{" * 16_000, "\\text{a}" * 12_500, "½" * 50_000, "ﷺ" * 50_000, "１" * 100_000, "yes" * 33_000,
    "the " * 25_000, "[" * 100_000, '["a",' * 20_000, "1e" * 50_000, "1 × 10^9 " * 11_000, "1/" * 50_000, ". " * 50_000,
    "the red block moved. " * 5_000, "<think>" * 14_000 + "</think>" * 1, "\ud800" * 100_000, "0." * 50_000,
    "2½" * 30_000, "2 1/2 " * 16_000, "not " * 25_000 + "true", "and a half " * 9_000, "```json" * 14_000,
    "1.a " * 25_000,
    "{" + '"a":' * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ADVERSARIAL)))
def test_long_repetition_takes_bounded_time(number: int) -> None:
    text = ADVERSARIAL[number]
    check(text)
    check(f"<think>{text}</think><answer>{text}</answer>")


def test_time_grows_with_the_text_not_its_square() -> None:
    """A quadratic rule would take 64 times as long for 8 times the text; a linear one 8 times."""

    def seconds(text: str) -> float:
        start = time.process_time()
        check(text)
        return time.process_time() - start

    for unit in ("(1,1", "\\boxed{", "1,111", "<answer>", "then ", "A ", "1. "):
        short = (unit * 60_000)[: MAX_CHARACTERS // 8]
        assert seconds((unit * 60_000)[:MAX_CHARACTERS]) < 32 * seconds(short) + 0.5, unit


def test_a_hundred_thousand_strings() -> None:
    rng = random.Random(0)
    alphabet = "".join(map(chr, range(32, 127))) + "０１２ＡＢ½−→，（）"
    for number in range(100_000):
        pieces = PIECES if number % 2 else alphabet
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(40)))
        result = score(SAMPLES[number % len(SAMPLES)], text)
        assert result.error is None and 0 <= result.reward <= 1, (text, result)
