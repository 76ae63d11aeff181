"""Nine kinds of question about a scene, one per capability dimension, and text-only ones for the general set.

Every question has five words and a mark, every answer few words: what a model of a million parameters can learn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from examples.tabletop.scene import BOX, CELLS, COLOURS, DIRECTIONS, Scene

GENERAL = "general"
NUMBERS = 19
"""Numbers 0..18 are in the vocabulary."""
CENTRES = tuple(f"{(cell + 0.5) / CELLS:g}" for cell in range(CELLS))
"""Normalised coordinates of the cells' middles."""


@dataclass(frozen=True)
class Kind:
    """One kind of question: which rule reward scores it, which dimension it probes, its one-word thought."""

    objective: str
    dimension: str
    thought: str


KINDS = {
    "where": Kind("affordance", "Perception & Object Grounding", "look"),
    "grasp": Kind("affordance", "Affordance & Function", "hold"),
    "count": Kind("counting", "Quantitative & Numerical", "count"),
    "distance": Kind("counting", "Spatial & Geometric", "measure"),
    "order": Kind("temporal", "Temporal & Sequential", "watch"),
    "boxed": Kind("success", "Scene & Action Understanding", "check"),
    "moved": Kind("success", "Multi-Object & Scene Consistency", "compare"),
    "next": Kind("prediction", "Physical & Causal Reasoning", "extend"),
    "plan": Kind("planning", "Decision & Task Planning", "list"),
}
GENERAL_KINDS = {"sum": Kind("exact", "", "add"), "largest": Kind("exact", "", "rank")}
VOCABULARY = sorted(
    {word for kind in (*KINDS.values(), *GENERAL_KINDS.values()) for word in kind.thought.split()}
    | set("where is the block does gripper grasp how many blocks are there cells between and order of in".split())
    | set("box did move which way it go list all moves what plus larger or yes no unsure answer".split())
    | set(COLOURS) | set(DIRECTIONS) | {BOX} | set(CENTRES) | {str(n) for n in range(NUMBERS)} | set("?.,:()")
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question with its exact answer. `extras` is what the scorer needs besides `gold`."""

    kind: str
    text: str
    answer: str
    gold: Any
    extras: dict[str, Any] = field(default_factory=dict)


def _point(kind: str, text: str, centre_2: np.ndarray) -> Question:
    """A point question: right is the cell-sized square around the block, clipped to the image."""
    cell = np.clip(centre_2, 0, CELLS - 1e-6).astype(int)
    low, high = np.clip((centre_2 - 0.5) / CELLS, 0, 1), np.clip((centre_2 + 0.5) / CELLS, 0, 1)
    corners = [[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]]
    polygon = [[round(float(x), 4), round(float(y), 4)] for x, y in corners]
    return Question(kind, text, f"({CENTRES[cell[0]]}, {CENTRES[cell[1]]})", polygon)


def _pick(rng: np.random.Generator, words: tuple[str, ...] | list[str]) -> str:
    return words[int(rng.integers(len(words)))]


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """One question of a kind about what the clip shows up to its end."""
    end_N2 = scene.blocks_at(scene.seconds)
    if kind == "where":
        block = int(rng.integers(len(scene.colours)))
        return _point(kind, f"where is the {scene.colours[block]} block ?", end_N2[block])
    if kind == "grasp":
        return _point(kind, "where does the gripper grasp ?", end_N2[scene.moves[-1].block])
    if kind == "count":
        return Question(kind, "how many blocks are there ?", str(len(scene.colours)), len(scene.colours))
    if kind == "distance":
        resting = [k for k in range(len(scene.colours)) if k != scene.moves[-1].block]
        block = int(rng.permutation(resting)[0])
        cell = next((m.target for m in scene.moves if m.block == block), scene.cells[block])
        apart = abs(cell[0] - scene.box[0]) + abs(cell[1] - scene.box[1])
        return Question(kind, f"cells between {scene.colours[block]} and box ?", str(apart), apart)
    if kind == "order":
        first = int(rng.integers(len(scene.movers) - 1))
        pair = scene.movers[first : first + 2]
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        return Question(kind, f"order of {a} and {b} ?", ", ".join(pair), list(pair))
    if kind == "boxed":
        others = [c for c in scene.colours if c != scene.boxed]
        colour = scene.boxed if scene.boxed and rng.random() < 0.65 else _pick(rng, others)
        return _yes_no(kind, f"is {colour} in the box ?", colour == scene.boxed)
    if kind == "moved":
        still = [c for c in scene.colours if c not in scene.movers]
        colour = _pick(rng, still) if still and rng.random() < 0.6 else _pick(rng, scene.movers)
        return _yes_no(kind, f"did the {colour} block move ?", colour in scene.movers)
    if kind == "next":
        return Question(kind, "which way does it go ?", scene.moves[-1].word, scene.moves[-1].word)
    if kind == "plan":
        steps = [f"{colour} {move.word}" for colour, move in zip(scene.movers, scene.moves, strict=True)]
        return Question(kind, "list all moves in order ?", ", ".join(steps), steps)
    raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(KINDS)}")


def _yes_no(kind: str, text: str, truth: bool) -> Question:
    word = "yes" if truth else "no"
    return Question(kind, text, word, word)


def ask_general(kind: str, rng: np.random.Generator) -> Question:
    """A text-only question."""
    a, b = int(rng.integers(NUMBERS // 2 + 1)), int(rng.integers(NUMBERS // 2 + 1))
    if kind == "sum":
        return Question(kind, f"what is {a} plus {b} ?", str(a + b), str(a + b))
    return Question(kind, f"larger : {a} or {b} ?", str(max(a, b)), str(max(a, b)))


def full_answer(question: Question) -> str:
    """The answer as the product's prompt asks for it."""
    kind = {**KINDS, **GENERAL_KINDS}[question.kind]
    return f"<think>{kind.thought}</think><answer>{question.answer}</answer>"
