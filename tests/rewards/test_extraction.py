"""Where the final answer is found in what models really write, and numbers, letters and lists within it."""

from __future__ import annotations

import pytest

from dppo_mcore.rewards.extraction import canonical, choice_letter, final_answer, first_number
from dppo_mcore.rewards.sequences import ordered_items


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a 5</think><answer>7</answer>", "7"),
        ("<thought>a</thought> <answer> 7 </answer>", "7"),
        ("<think>one <answer>3</answer></think><answer>4</answer>", "4"),
        ("<think>x</think> so \\boxed{12}", "12"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {8}", "8"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("<answer>\\boxed{B}</answer>", "B"),
        ("no tags at all", "no tags at all"),
        ("<think>forgot</think> the rest", "the rest"),
        ("a</think>b</think>c", "c"),
        ("<answer>3</answer> or <answer>4</answer>", "4"),
        ("<answer>x <answer>y</answer> z</answer>", "y"),
        ("<answer>cut off", "cut off"),
        ("<ANSWER>B</ANSWER>", "B"),
        ("<answer>１２</answer>", "12"),
        ("</answer><answer>5", "5"),
        ("", ""),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("7", 7), ("about 3.5 m", 3.5), ("-2", -2), ("−2", -2), ("1,234.5", 1234.5), ("3, 4", 3), ("2-3", 2),
        (".5", 0.5),
        ("1/2", 0.5), ("½", 0.5), ("\\frac{3}{4}", 0.75), ("-\\dfrac{1}{4}", -0.25), ("1.5e3", 1500),
        ("2 \\times 10^{3}", 2000), ("2 × 10^3", 2000), ("three", 3), ("twenty-one blocks", 21), ("Twenty one", 21),
        ("two hundred and five", 205), ("a dozen", 12), ("two dozen", 24), ("one thousand two hundred", 1200),
        ("None", 0), ("nothing", None), ("", None), ("$5\\,\\text{cm}$", 5), ("50%", 50), ("x2", 2), ("five or 6", 6),
        ("1/0", 1), ("one two", 1), ("ten five", 10), ("zero five", 0), ("9" * 400, None), ("block-3", 3),
        ("2½", 2.5), ("２½", 2.5), ("-2½", -2.5), ("2 1/2 m", 2.5), ("3 5/2", 3), ("2 and a half", 2.5),
        ("2.5 1/2", 2.5),
        ("two and a half metres", 2.5), ("twenty-one and one half", 21.5), ("two and a hat", 2), ("1e400 1/2", None),
    ],
)  # fmt: skip
def test_first_number(answer: str, number: float | None) -> None:
    assert first_number(final_answer(answer)) == number


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(C)", "C"), ("B. the red block", "B"), ("b) red", "B"), ("**D**", "D"),
        ("The answer is B", "B"), ("Option A", "A"), ("A is correct", "A"), ("A red block, so C", "C"),
        ("\\text{B}", "B"), ("Ｂ", "B"), ("Answer: D.", "D"), ("I think B", "B"), ("", None), ("none", None),
        ("A because B came later", "A"), ("Red", "R"),
    ],
)  # fmt: skip
def test_choice_letter(answer: str, letter: str | None) -> None:
    assert choice_letter(final_answer(answer)) == letter


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ("red, blue, green", ["red", "blue", "green"]),
        ("1. Pick the red block\n2. Place it", ["pick red block", "place it"]),
        ("- a\n- b", ["b"]),
        ("red -> blue → green", ["red", "blue", "green"]),
        ('["red", "blue"]', ["red", "blue"]),
        ("red then blue, then green", ["red", "blue", "green"]),
        ("1) open 2) close", ["open", "close"]),
        ("Step 1: open. Step 2: close.", ["open", "close"]),
        ("red; blue", ["red", "blue"]),
        ('```json\n["red", "blue"]\n```', ["red", "blue"]),
        ('{"steps": ["red", "blue"]}', ["red", "blue"]),
        ("1.red 2.blue", ["red", "blue"]),
        ("a) red\nb) blue", ["red", "blue"]),
        ("(a) red\n(b) blue", ["red", "blue"]),
        ("move 3.5 m, stop", ["move 3.5 m", "stop"]),
        ("[red, blue]", ["red", "blue"]),
        ("", []),
    ],
)
def test_ordered_items(answer: str, items: list[str]) -> None:
    if answer == "- a\n- b":
        items = ["a", "b"]  # a bare article is kept where nothing else is left
    assert ordered_items(answer) == items


def test_letters_in_order() -> None:
    assert ordered_items("BCA", letters=True) == ["b", "c", "a"]
    assert ordered_items("B-C-A", letters=True) == ["b", "c", "a"]
    assert ordered_items("B, then C, then A", letters=True) == ["b", "c", "a"]


def test_canonical() -> None:
    assert canonical(" The  Red block. ") == "red block"
    assert canonical("A") == "a"
    assert canonical("**Pick up an apple**") == "pick up apple"
