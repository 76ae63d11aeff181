"""A gold answer written out, as a model may learn it, is an answer that the rule reward calls right."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_mcore.practice.prompts import PromptTemplate
from dppo_mcore.rewards import Rubric, known_objectives, score
from dppo_mcore.rewards.extraction import canonical, comparable
from dppo_mcore.rewards.format import Structure
from dppo_mcore.rewards.reference import reference
from dppo_mcore.types import Sample

WORD = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789é", min_size=1, max_size=9)
PHRASE = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
LETTERS = st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=1, max_size=8, unique=True)
ORDERS: st.SearchStrategy[list[Any]] = st.one_of(
    LETTERS,
    LETTERS.map(lambda letters: [letter.lower() for letter in letters]),
    st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True),
    st.lists(st.integers(0, 9).map(str), min_size=1, max_size=8, unique=True),
    st.lists(PHRASE, min_size=1, max_size=8, unique_by=canonical),
    st.lists(PHRASE, min_size=2, max_size=8, unique_by=canonical).map(
        lambda steps: [f"{n}. {step}, then wait" for n, step in enumerate(steps, 1)]
    ),
)
SHARE = st.floats(0, 0.99)
PIXEL = st.integers(2, 200)


def ascending(number: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    """Boxes that are not thinner than a few cells of the raster that rewards look at."""
    sides = st.tuples(number, number).filter(lambda pair: pair[1] - pair[0] > 0.01)
    return st.tuples(sides, sides).map(lambda xy: [xy[0][0], xy[1][0], xy[0][1], xy[1][1]])


BOX = ascending(SHARE) | st.just([0, 0, 1, 1])
PIXEL_BOX = ascending(PIXEL)
POLYGON = BOX.filter(lambda box: box[2] < 1).map(lambda b: [[b[0], b[1]], [b[2], b[1]], [b[2], b[3]]])


@st.composite
def choices(draw: st.DrawFn, objective: str) -> Sample:
    """An option by letter or by text, options by list or mapping, or no options at all."""
    texts: list[Any] = draw(
        st.lists(PHRASE, min_size=2, max_size=6, unique_by=comparable)
        | st.lists(st.integers(0, 20), min_size=2, max_size=6, unique=True)
        | st.lists(st.sampled_from("ABCDEFabcdef"), min_size=2, max_size=6, unique_by=str.lower)
    )
    letters = "ABCDEF"[: len(texts)]
    place = draw(st.integers(0, len(texts) - 1))
    gold = draw(st.sampled_from([letters[place], texts[place], f"{letters[place]}. {texts[place]}"]))
    options = draw(st.sampled_from([texts, dict(zip(letters, texts, strict=True)), None]))
    return Sample("s", objective, (), gold=gold, extras={} if options is None else {"options": options})


def made(objective: str, gold: st.SearchStrategy[Any], **extras: Any) -> st.SearchStrategy[Sample]:
    """Samples of an objective."""
    return gold.map(lambda value: Sample("s", objective, (), gold=value, extras=extras))


SAMPLES: dict[str, st.SearchStrategy[Sample]] = {
    "affordance": made("affordance", POLYGON | BOX | st.lists(BOX, min_size=1, max_size=3))
    | made("affordance", st.fixed_dictionaries({"polygon": POLYGON}) | st.fixed_dictionaries({"box": BOX}))
    | made("affordance", st.fixed_dictionaries({"box": PIXEL_BOX}), size=[200, 200]),
    "boxes": made("boxes", BOX | PIXEL_BOX | st.lists(BOX, min_size=1, max_size=3))
    | made("boxes", PIXEL_BOX | st.fixed_dictionaries({"boxes": st.lists(PIXEL_BOX, min_size=1)}), size=[200, 200]),
    "counting": made("counting", st.integers(-9999, 9999) | st.floats(-1e6, 1e6) | st.sampled_from(["three", "1,200"])),
    "exact": made("exact", st.integers() | st.floats(-1e30, 1e30) | st.booleans())
    | made("exact", PHRASE | st.lists(PHRASE, min_size=1))
    | choices("exact"),
    "planning": made("planning", ORDERS | st.just("red, blue")),
    "prediction": made("prediction", PHRASE) | choices("prediction"),
    "success": made("success", st.booleans() | st.sampled_from(["yes", "No", "true", "False", "not true"])),
    "temporal": made("temporal", ORDERS | PHRASE) | choices("temporal"),
}


def test_all_objectives_are_covered() -> None:
    assert set(SAMPLES) <= set(known_objectives())


@pytest.mark.parametrize("objective", SAMPLES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), structure=st.sampled_from(get_args(Structure)))
def test_the_gold_answer_written_out_is_right(objective: str, structure: Structure, data: st.DataObject) -> None:
    sample = data.draw(SAMPLES[objective])
    template = PromptTemplate(structure=structure)
    text = template.replayed(sample)
    assert text is not None
    result = score(sample, text, Rubric(structure=structure))
    assert result.error is None and result.success, (sample, text, result)
    # Where reasoning is asked for there is no answer in that structure: the gold answer is then learnt as it is.
    assert template.bare(sample) == (None if structure == "think-answer" else text)
    assert result.parts["format"] == (structure != "think-answer")


@pytest.mark.parametrize(
    ("objective", "gold", "text"),
    [
        ("affordance", {"polygon": [[0, 0.5], [1, 0.5], [1, 1]]}, "(0.0, 0.5), (1.0, 0.5), (1.0, 1.0)"),
        ("affordance", {"mask": "mask.png"}, None),
        ("boxes", [10, 10, 50, 50], "[10, 10, 50, 50]"),
        ("exact", ["Paris", "Lutetia"], "Paris"),
        ("exact", "<think>so</think><answer>B</answer>", "B"),
        ("planning", ["pick", "place"], "pick\nplace"),
        ("success", False, "no"),
        ("temporal", [2, 1, 3], "2, 1, 3"),
        ("temporal", None, None),
        ("mine", {"width": 3}, "{'width': 3}"),
    ],
)
def test_written_the_way_the_objective_asks_for(objective: str, gold: Any, text: str | None) -> None:
    assert reference(Sample("s", objective, (), gold=gold)) == text
