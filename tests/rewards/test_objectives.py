"""Worked examples of every formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dppo_mcore.rewards import Rubric, score
from dppo_mcore.rewards.boxes import iou
from dppo_mcore.rewards.counting import mean_relative_accuracy
from dppo_mcore.rewards.format import format_reward
from dppo_mcore.rewards.sequences import longest_common_subsequence, pair_agreement
from dppo_mcore.types import Sample


def task(objective: str, gold: Any, answer: str, **extras: Any) -> float:
    result = score(Sample("s", objective, (), gold=gold, extras=extras), f"<think>so</think><answer>{answer}</answer>")
    assert result.error is None
    return result.parts["task"]


def test_reward_is_the_weighted_sum() -> None:
    sample = Sample("s", "counting", (), gold=10)
    well = score(sample, "<think>so</think><answer>9</answer>")
    assert well.parts == {"format": 1.0, "task": 0.9}
    assert well.reward == pytest.approx(0.1 * 1 + 0.9 * 0.9)
    assert well.success
    bare = score(sample, "9")
    assert bare.reward == pytest.approx(0.81)
    assert not score(sample, "5").success
    assert score(sample, "9", Rubric(0.5, 0.5, 0.95)).success is False


def test_mean_relative_accuracy() -> None:
    # |8 - 10| / 10 = 0.2 is within 1 - t for t = .50, .55, .60, .65, .70, .75: six of ten.
    assert mean_relative_accuracy(7.6, 10) == pytest.approx(0.6)
    assert mean_relative_accuracy(10, 10) == 1
    assert mean_relative_accuracy(4, 10) == 0
    assert mean_relative_accuracy(0, 0) == 1
    assert mean_relative_accuracy(1, 0) == 0
    assert mean_relative_accuracy(-9, -10) == pytest.approx(0.9)


def test_counting_units() -> None:
    assert task("counting", 1.2, "120 cm", unit="m") == 1
    assert task("counting", 1.2, "1.2", unit="m") == 1
    assert task("counting", 90, "1.5 minutes", unit="s") == 1
    assert task("counting", 30, "0.3 \\text{ m}", unit="cm") == 1
    assert task("counting", 3, "3 blocks", unit="m") == 1
    assert task("counting", "three", "3") == 1


def test_points_in_polygon() -> None:
    square = [[0.2, 0.2], [0.6, 0.2], [0.6, 0.6], [0.2, 0.6]]
    assert task("affordance", square, "(0.3, 0.3)") == 1
    assert task("affordance", square, "(0.3, 0.3), (0.7, 0.3)") == 0.5
    assert task("affordance", square, "(0.2, 0.2)") == 1
    assert task("affordance", square, "(30, 30), (61, 30), (120, 30), (-5, 30)", size=[100, 100]) == 0.25
    assert task("affordance", square, "nowhere") == 0
    assert task("affordance", {"polygons": [square, [[0.8, 0.8], [0.9, 0.8], [0.9, 0.9]]]}, "(0.88, 0.82)") == 1
    # A box counts its pixels: half of this one's 20 columns are inside.
    assert task("affordance", square, "(50, 30, 70, 50)", size=[100, 100]) == pytest.approx(0.5)


def test_points_in_mask(tmp_path: Path) -> None:
    mask_HW = np.zeros((4, 6), dtype=np.uint8)
    mask_HW[1:3, 2:5] = 1
    assert task("affordance", {"mask": mask_HW.tolist()}, "(2, 1), (4, 2), (5, 2)") == pytest.approx(2 / 3)
    np.save(tmp_path / "mask.npy", mask_HW)
    assert task("affordance", {"mask": str(tmp_path / "mask.npy")}, "(0.5, 0.5)") == 1
    from PIL import Image

    Image.fromarray(mask_HW * 255).save(tmp_path / "mask.png")
    assert task("affordance", None, "(1, 0, 5, 3)", mask=str(tmp_path / "mask.png")) == pytest.approx(6 / 12)


def test_choice() -> None:
    options = ["red block", "blue block", "green block"]
    assert task("temporal", "B", "B") == 1
    assert task("temporal", "B", "B. blue block", options=options) == 1
    assert task("temporal", "B", "the blue block", options=options) == 1
    assert task("temporal", "B", "C", options=options) == 0
    assert task("prediction", "blue block", "B", options=options) == 1
    assert task("prediction", "B. blue block", "b") == 1
    assert task("prediction", "pick up the red block", "Pick up red block.") == 1
    assert task("prediction", "up", "down") == 0
    assert task("temporal", "red", "red") == 1


@pytest.mark.parametrize("objective", ["temporal", "prediction", "exact"])
def test_choice_among_short_texts(objective: str) -> None:
    """Options of one character, numbers among them, are found by letter and by text alike."""
    numbers = ["2", "3", "4"]
    for gold in ("3", 3, 3.0, "B", "b", "B. 3"):
        for answer in ("B", "b", "(B)", "B. 3", "3", "3.0", "It is B"):
            assert task(objective, gold, answer, options=numbers) == 1, (gold, answer)
        for answer in ("A", "2", "C. 4", "9", "none"):
            assert task(objective, gold, answer, options=numbers) == 0, (gold, answer)
    for gold in ("2", 2, "blue"):
        for answer in ("2", "(2)", "2. blue", "blue"):
            assert task(objective, gold, answer, options={"1": "red", "2": "blue"}) == 1, (gold, answer)
        assert task(objective, gold, "1. red", options={"1": "red", "2": "blue"}) == 0
    # "A" is the letter of the first option and the text of the second: it's read as the letter.
    mixed = ["B", "A", "C"]
    assert [task(objective, "B", answer, options=mixed) for answer in ("B", "b", "B. A", "A", "C")] == [1, 1, 1, 0, 0]
    assert task(objective, "x", "x") == task(objective, "é", "é") == 1


def test_order() -> None:
    # Of the three pairs of (red, blue, green) two agree: tau = 1/3, (tau + 1) / 2 = 2/3.
    assert task("temporal", ["red", "blue", "green"], "red, green, blue") == pytest.approx(2 / 3)
    assert task("temporal", ["red", "blue", "green"], "green, blue, red") == 0
    assert task("temporal", ["red", "blue", "green"], "red, blue") == pytest.approx(1 / 3)
    assert task("temporal", ["A", "B", "C"], "ACB") == pytest.approx(2 / 3)
    assert pair_agreement(["a", "a", "b"], ["a", "b"]) == 1


@pytest.mark.parametrize("objective", ["temporal", "planning"])
def test_orders_of_digits_and_letters(objective: str) -> None:
    for gold in ([2, 1, 3], ["2", "1", "3"], ["(2)", "(1)", "(3)"]):
        for answer in ("2, 1, 3", "2\n1\n3", "1. 2\n2. 1\n3. 3", "2 -> 1 -> 3", "[2, 1, 3]", "(2), (1), (3)"):
            assert task(objective, gold, answer) == 1, (gold, answer)
        assert task(objective, gold, "3, 1, 2") < 1
    orders = ["b, a, c", "B, A, C", "BAC", "B-A-C", "b-a-c", "(b), (a), (c)", "B) A) C)", "1. B\n2. A\n3. C",
              "The order is b, a, c", "The order is B, A, C", '["b", "a", "c"]', "B. go, A. do, C. be"]  # fmt: skip
    for gold in (["b", "a", "c"], ["B", "A", "C"], ["B.", "A.", "C."]):
        for answer in orders:
            assert task(objective, gold, answer) == 1, (gold, answer)
        assert task(objective, gold, "c, a, b") < 1
    assert task(objective, ["1. pick up", "2. place"], "1. Pick up\n2. Place") == 1


def test_success() -> None:
    assert task("success", "yes", "Yes, it was.") == 1
    assert task("success", "no", "Yes") == 0
    assert task("success", False, "No.") == 1
    assert task("success", True, "true") == 1
    assert task("success", "yes", "perhaps") == 0
    assert task("success", "no", "It's not true.") == 1
    assert task("success", "no", "That isn't true") == 1
    assert task("success", "no", "This is not false") == 0


def test_planning() -> None:
    plan = ["pick up the red block", "place it in the box", "open the gripper"]
    assert task("planning", plan, "1. Pick up the red block\n2. Place it in the box\n3. Open the gripper") == 1
    assert task("planning", plan, "1. Pick up the red block\n2. Open the gripper") == pytest.approx(2 / 3)
    assert task("planning", plan, "\n".join([*plan, "go home"])) == pytest.approx(3 / 4)
    assert task("planning", "red, blue", "red -> blue") == 1
    assert longest_common_subsequence("abcbdab", "bdcaba") == 4


def test_boxes() -> None:
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert task("boxes", [0, 0, 0.4, 0.4], "[0.0, 0.0, 0.4, 0.4]") == 1
    assert task("boxes", [0, 0, 40, 40], "[0.0, 0.0, 0.4, 0.4]", size=[100, 100]) == pytest.approx(1)
    assert task("boxes", [[0, 0, 40, 40], [50, 50, 60, 60]], "[0, 0, 40, 40]", size=[100, 100]) == 0.5
    assert task("boxes", [0, 0, 40, 40], "[0, 0, 40, 40], [1, 1, 2, 2]", size=[100, 100]) == 0.5
    assert task("boxes", [0.1, 0.1, 0.4, 0.4], "(0.2, 0.2)") == 0  # drift from boxes to points


def test_exact() -> None:
    assert task("exact", "12", "12.0") == 1
    assert task("exact", 1200, "1,200") == 1
    assert task("exact", "Paris", "paris.") == 1
    assert task("exact", ["Paris", "Lutetia"], "lutetia") == 1
    assert task("exact", "12", "13") == 0
    assert task("exact", "C", "C) third") == 1
    assert task("exact", ".5", "5") == 0 and task("exact", ".5", "0.5") == task("exact", 1e-7, "1e-7") == 1
    assert task("exact", True, "true") == 1


def test_reference_answer_as_gold() -> None:
    assert task("exact", "<think>so</think><answer>B</answer>", "B") == 1


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1), (" <think>a</think>\n<answer>b</answer>\n", 1),
        ("<think>a</think><answer>b</answer> more", 0), ("hm <think>a</think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0), ("<think></think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0), ("<think>a</think>b<answer>c</answer>", 0),
        ("<think>a<think>b</think><answer>c</answer>", 0), ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think>", 0), ("b", 0), ("", 0),
    ],
)  # fmt: skip
def test_format(text: str, reward: float) -> None:
    assert format_reward(text) == reward


def test_other_structures() -> None:
    assert format_reward("<answer>b</answer>", "answer") == 1
    assert format_reward("b", "answer") == 0
    assert format_reward("b", "plain") == 1


def test_a_scorer_that_raises_gives_zero_and_says_so() -> None:
    result = score(Sample("s", "counting", (), gold="no number"), "<answer>3</answer>")
    assert result.reward == 0 and not result.success
    assert result.error == "ValueError: gold of counting sample 's' holds no number: 'no number'"
    assert "known: affordance" in (score(Sample("s", "nonesuch", ()), "x").error or "")
