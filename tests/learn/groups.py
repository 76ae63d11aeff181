"""Scored answer groups and conversations made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dppo_mcore.learn.rl import Group
from dppo_mcore.model.config import QwenConfig
from dppo_mcore.types import FramePlan, Prompt, PromptMedia, Rollout, Sample, ScoredRollout
from tests.learn.batches import Question, random_questions


def prompt_of(question: Question, answer: Sequence[int] = ()) -> Prompt:
    """The question as a prompt, or with an answer as a conversation."""
    media: tuple[PromptMedia, ...] = ()
    if question.grid is not None:
        t, h, w = question.grid
        frames = tuple(range(2 * t))
        plan = FramePlan(
            f"{question.name}.mp4", "video", frames, tuple(map(float, frames)), (14 * h, 14 * w), question.grid, 0.5
        )
        media = (PromptMedia(plan, question.patches),)
    sample = Sample(question.name, "exact", (), source="video" if media else "text")
    mask = (*[False] * len(question.token_ids), *[True] * len(answer)) if answer else None
    return Prompt(sample, (*question.token_ids, *answer), media, mask)


def random_groups(qwen: QwenConfig, count: int, size: int, seed: int = 0, longest: int = 16) -> list[Group]:
    """Groups with rewards in {0, 1}; every fifth group is all alike."""
    random = np.random.default_rng(seed + 1000)
    groups = []
    for number, question in enumerate(random_questions(qwen, count, size, seed, ("rollout_logprobs",), longest)):
        answers = []
        for index, answer in enumerate(question.answers):
            reward = 1.0 if number % 5 == 4 else float(random.integers(0, 2))
            rollout = Rollout(
                question.name, index, tuple(answer.token_ids), tuple(answer.columns["rollout_logprobs"]), "", "stop"
            )
            answers.append(ScoredRollout(rollout, reward, {"format": 1.0, "task": reward}, reward >= 0.5))
        groups.append(Group(prompt_of(question), tuple(answers)))
    return groups


def random_conversations(qwen: QwenConfig, count: int, seed: int = 0) -> list[Prompt]:
    """Conversations with one learnt answer each."""
    return [prompt_of(q, q.answers[0].token_ids) for q in random_questions(qwen, count, 1, seed)]
