"""One answer's reward: format_weight * format + task_weight * task, and whether it counts as success."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from dppo_mcore.rewards import affordance, boxes, counting, exact, planning, prediction, success, temporal
from dppo_mcore.rewards.extraction import BOXED, final_answer
from dppo_mcore.rewards.format import Structure, format_reward
from dppo_mcore.rewards.registry import scorer_of
from dppo_mcore.types import Rollout, Sample, ScoredRollout

BUILT_IN = (affordance, boxes, counting, exact, planning, prediction, success, temporal)
"""Importing these registers them."""


@dataclass(frozen=True, slots=True)
class Rubric:
    """How parts become a reward."""

    format_weight: float = 0.1
    task_weight: float = 0.9
    success_threshold: float = 0.5
    """Task reward from which an answer is a success."""
    structure: Structure = "think-answer"


DEFAULT_RUBRIC = Rubric()


def plain_gold(sample: Sample) -> Sample:
    """A gold answer that is a whole reference answer (thought, tags, box) stands for its final answer."""
    gold = sample.gold
    if isinstance(gold, str) and ("<answer>" in gold or BOXED in gold or "</think>" in gold):
        return replace(sample, gold=final_answer(gold))
    return sample


class Score(NamedTuple):
    """Reward in [0, 1] (for weights that sum to 1), its parts "format" and "task", success, the scorer's error."""

    reward: float
    parts: dict[str, float]
    success: bool
    error: str | None

    def of(self, rollout: Rollout) -> ScoredRollout:
        """The rollout with this score."""
        return ScoredRollout(rollout, self.reward, self.parts, self.success, self.error)


def failed(error: str) -> Score:
    """The score of an answer whose scorer failed."""
    return Score(0.0, {"format": 0.0, "task": 0.0}, False, error)


def score(sample: Sample, text: str, rubric: Rubric = DEFAULT_RUBRIC) -> Score:
    """Score an answer. A scorer that raises gives 0 and its error; nothing an answer holds raises here."""
    try:
        task = float(scorer_of(sample.objective)(plain_gold(sample), final_answer(text)))
    except (Exception, SystemExit) as error:
        return failed(f"{type(error).__name__}: {error}"[:2000])
    if not math.isfinite(task):
        return failed(f"scorer of {sample.objective!r} gave {task}")
    task = min(1.0, max(0.0, task))
    form = format_reward(text, rubric.structure)
    reward = rubric.format_weight * form + rubric.task_weight * task
    return Score(reward, {"format": form, "task": task}, task >= rubric.success_threshold, None)
