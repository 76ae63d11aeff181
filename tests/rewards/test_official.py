"""The official scorers' behaviour on a table: extraction order, relative accuracy, points in a mask, choices, yes/no.

Expected values were worked out by hand from the official rules. Where ours differ on purpose, the case says so and
`docs/rewards.md` lists it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dppo_mcore.rewards import score
from dppo_mcore.types import Sample

MASK_HW = np.zeros((10, 20), dtype=np.uint8)
MASK_HW[2:6, 5:15] = 1
MASK = {"mask": MASK_HW.tolist()}  # 20 wide, 10 high; inside: x 5..14, y 2..5

CASES: list[tuple[str, Any, str, float]] = [
    # Extraction: up to the last end of thought, then the tags, then the last box, then all of it.
    ("counting", 7, "<think>maybe 3</think><answer>7</answer>", 1.0),
    ("counting", 7, "<thought>maybe 3</thought><answer>7</answer>", 1.0),
    ("counting", 7, "<think>3</think>7", 1.0),
    ("counting", 7, "<think>3</think>\\boxed{7}", 1.0),
    ("counting", 7, "\\boxed{3} no, \\boxed{7}", 1.0),
    ("counting", 7, "\\boxed{3} <answer>7</answer>", 1.0),
    ("counting", 7, "7", 1.0),
    ("counting", 7, "<think>7</think><answer>5</answer>", 0.5),
    ("counting", 7, "<answer>7", 1.0),
    ("counting", 7, "there are 7 of 9", 1.0),
    ("temporal", "B", "<think>A</think><answer>B</answer>", 1.0),
    ("temporal", "B", "<think>B</think><answer>A</answer>", 0.0),
    # Mean relative accuracy over .50, .55, ..., .95.
    ("counting", 10, "10", 1.0),
    ("counting", 10, "9.6", 1.0),
    ("counting", 10, "9.2", 0.9),
    ("counting", 10, "8.8", 0.8),
    ("counting", 10, "8.2", 0.7),
    ("counting", 10, "7.7", 0.6),
    ("counting", 10, "7.2", 0.5),
    ("counting", 10, "6.7", 0.4),
    ("counting", 10, "6.2", 0.3),
    ("counting", 10, "5.7", 0.2),
    ("counting", 10, "5.2", 0.1),
    ("counting", 10, "4.9", 0.0),
    ("counting", 10, "10.4", 1.0),
    ("counting", 10, "12.2", 0.6),
    ("counting", 10, "14.8", 0.1),
    ("counting", 10, "15.1", 0.0),
    ("counting", 10, "100", 0.0),
    ("counting", 4, "3", 0.6),
    ("counting", 3, "2", 0.4),
    ("counting", 2.5, "2.4 m", 1.0),
    ("counting", 0.5, "0.61", 0.6),
    ("counting", 10, "no idea", 0.0),
    ("counting", 10, "", 0.0),
    # Points in a mask: whole numbers are pixels, decimals in [0, 1] shares; outside the image is wrong.
    ("affordance", MASK, "[(5, 2)]", 1.0),
    ("affordance", MASK, "[(14, 5)]", 1.0),
    ("affordance", MASK, "[(15, 5)]", 0.0),
    ("affordance", MASK, "[(14, 6)]", 0.0),
    ("affordance", MASK, "[(4, 2), (5, 2)]", 0.5),
    ("affordance", MASK, "[(0.5, 0.3)]", 1.0),
    ("affordance", MASK, "[(0.25, 0.2)]", 1.0),
    ("affordance", MASK, "[(0.24, 0.2)]", 0.0),
    ("affordance", MASK, "[(0.74, 0.59)]", 1.0),
    ("affordance", MASK, "[(0.75, 0.59)]", 0.0),
    ("affordance", MASK, "[(20, 3), (6, 3)]", 0.5),
    ("affordance", MASK, "[(-1, 3), (6, 3)]", 0.5),
    ("affordance", MASK, "[(6, 10), (6, 3), (7, 3), (8, 3)]", 0.75),
    ("affordance", MASK, "[(1.0, 0.3)]", 0.0),
    ("affordance", MASK, "(5, 2, 15, 6)", 1.0),
    ("affordance", MASK, "(5, 2, 15, 10)", 0.5),
    ("affordance", MASK, "(0, 0, 20, 10)", 0.2),
    ("affordance", MASK, "(0.25, 0.2, 0.75, 0.6)", 1.0),
    ("affordance", MASK, "(10, 2, 20, 6)", 0.5),
    ("affordance", MASK, "<think>(0, 0)</think><answer>[(6, 3)]</answer>", 1.0),
    ("affordance", MASK, "(1, 2, 3)", 0.0),
    ("affordance", MASK, "over there", 0.0),  # ours: the official mean leaves it out
    # Choices: the first capital letter of the answer.
    ("temporal", "B", "B", 1.0),
    ("temporal", "B", "B. The red one", 1.0),
    ("temporal", "B", "(B)", 1.0),
    ("temporal", "B", "it is B", 1.0),
    ("temporal", "B", "C", 0.0),
    ("temporal", "B", "no letter", 0.0),
    ("prediction", "D", "D", 1.0),
    ("prediction", "D", "<answer>D: close</answer>", 1.0),
    ("temporal", "B", "The answer is B", 1.0),  # ours: the official rule would take the T
    # Yes and no.
    ("success", "yes", "Yes", 1.0),
    ("success", "yes", "yes, it did", 1.0),
    ("success", "no", "No.", 1.0),
    ("success", "no", "yes", 0.0),
    ("success", "yes", "unclear", 0.0),
]


def test_the_table_is_large_enough() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize(("objective", "gold", "text", "expected"), CASES)
def test_official(objective: str, gold: Any, text: str, expected: float) -> None:
    result = score(Sample("s", objective, (), gold=gold), text)
    assert result.error is None
    assert result.parts["task"] == pytest.approx(expected)


def test_every_pixel_of_the_mask() -> None:
    for y in range(-1, 11):
        for x in range(-1, 21):
            inside = 0 <= y < 10 and 0 <= x < 20 and bool(MASK_HW[y, x])
            assert score(Sample("s", "affordance", (), gold=MASK), f"({x}, {y})").parts["task"] == float(inside)


def test_relative_accuracy_equals_the_formula() -> None:
    rng = np.random.default_rng(0)
    thresholds_10 = np.linspace(0.5, 0.95, 10)
    for truth, estimate in rng.uniform(0.1, 50, (500, 2)).round(2):
        expected = np.mean(abs(estimate - truth) / truth <= 1 - thresholds_10)
        result = score(Sample("s", "counting", (), gold=float(truth)), f"<answer>{estimate}</answer>")
        assert result.parts["task"] == expected
