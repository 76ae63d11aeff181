"""What the model is asked to write: system prompt, one instruction per objective, and the structure of an answer.

The format reward checks the same structure, and answers for SFT are brought into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

from dppo_mcore.rewards.extraction import BOXED, final_answer
from dppo_mcore.rewards.format import TAGS, Structure, format_reward
from dppo_mcore.rewards.reference import reference
from dppo_mcore.types import Sample, Turn

SYSTEM = {
    "think-answer": (
        "You watch what the camera of a robot shows and answer questions about it. First reason step by step between "
        "<think> and </think>. Then give the final answer alone between <answer> and </answer>, and write nothing "
        "after it."
    ),
    "answer": "Answer the question about what is shown. Give the final answer alone between <answer> and </answer>.",
    "plain": "You are a helpful assistant.",
}

INSTRUCTIONS = {
    "affordance": "Answer with points as (x, y), each coordinate a share of the image's width or height from 0 to 1.",
    "counting": "Answer with one number.",
    "temporal": "Answer with the option's letter, or with the events in order, separated by commas.",
    "success": "Answer with yes or no.",
    "planning": "Answer with the steps in order, one on each line.",
    "prediction": "Answer with the option's letter, or with the next action.",
    "boxes": "Answer with a box as [x1, y1, x2, y2], each coordinate a share of the image's width or height "
    "from 0 to 1.",
    "exact": "Answer as briefly as you can.",
}


@dataclass(frozen=True)
class PromptTemplate:
    """System prompt, instructions and structure of the answer."""

    system: str | None = None
    """None is the built-in one for the structure; empty is none."""
    instructions: Mapping[str, str] = field(default_factory=lambda: dict(INSTRUCTIONS))
    """Appended to the question, by objective."""
    structure: Structure = "think-answer"

    @property
    def system_text(self) -> str:
        """The system prompt in force."""
        return SYSTEM[self.structure] if self.system is None else self.system

    def apply(self, sample: Sample) -> Sample:
        """The sample with system turn and instruction; a system turn of its own stays."""
        sample = self._instruct(sample)
        if not self.system_text or any(turn.role == "system" for turn in sample.turns):
            return sample
        return replace(sample, turns=(Turn("system", self.system_text), *sample.turns))

    def apply_to_general(self, sample: Sample) -> Sample:
        """The same for general data, where the system prompt is left out if the sample's answer isn't what it asks for.

        Learning such an answer under that prompt would teach the model to ignore it.
        """
        text = self.replayed(sample)
        return self.apply(sample) if text is None or format_reward(text, self.structure) else self._instruct(sample)

    def _instruct(self, sample: Sample) -> Sample:
        instruction = self.instructions.get(sample.objective, "")
        if not instruction:
            return sample
        *before, last = sample.turns
        return replace(sample, turns=(*before, Turn(last.role, f"{last.content}\n{instruction}")))

    def conform(self, text: str) -> str | None:
        """`text` in the structure asked for, its reasoning and final answer kept; None where it can't be.

        An answer without any reasoning can't be made to reason, so under "think-answer" it's None.
        """
        text = text.strip()
        if format_reward(text, self.structure):
            return text
        answer = final_answer(text)
        if not answer or self.structure == "plain":
            return text or None
        if self.structure == "answer":
            return f"<answer>{answer}</answer>"
        thought = _reasoning(text)
        if not thought or thought == answer:
            return None
        framed = f"<think>{thought}</think>\n<answer>{answer}</answer>"
        return framed if format_reward(framed, self.structure) else None

    def bare(self, sample: Sample) -> str | None:
        """A sample's gold answer as text in the structure asked for; None where that asks for reasoning."""
        text = None if self.structure == "think-answer" else reference(sample)
        return f"<answer>{text}</answer>" if text is not None and self.structure == "answer" else text

    def replayed(self, sample: Sample) -> str | None:
        """What general data teaches: its answer as the data set wrote it, else the gold answer, if need be as it is."""
        return sample.answer or self.bare(sample) or reference(sample)


def _reasoning(text: str) -> str:
    """What stands before the final answer, without tags."""
    low = text.lower()
    for mark in ("</think>", "</thought>", "<answer>", BOXED):
        at = low.find(mark)
        if at >= 0:
            text = text[:at]
            break
    for tag in (*TAGS["think-answer"], "<thought>", "</thought>"):
        text = text.replace(tag, "")
    return text.strip()


def load_template(file: str = "") -> PromptTemplate:
    """Template from a YAML file with any of `system`, `instructions` (by objective) and `structure`.

    Instructions given there replace the built-in ones of the same objective; "" removes one.
    """
    if not file:
        return PromptTemplate()
    import yaml

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"prompt_template: no file {path}")
    content = yaml.safe_load(path.read_text()) or {}
    known = {entry.name for entry in fields(PromptTemplate)}
    if not isinstance(content, dict) or not set(content) <= known:
        strange = content if not isinstance(content, dict) else sorted(set(content) - known)
        raise ValueError(f"prompt_template {path}: unknown {strange}; give {', '.join(sorted(known))}")
    structure = content.get("structure", "think-answer")
    if structure not in get_args(Structure):
        raise ValueError(f"prompt_template {path}: structure {structure!r} is none of {', '.join(get_args(Structure))}")
    instructions = {**INSTRUCTIONS, **{str(k): str(v or "") for k, v in (content.get("instructions") or {}).items()}}
    return PromptTemplate(content.get("system"), instructions, structure)
