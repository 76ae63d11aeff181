"""The operations that MFU divides by, against those that really run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dppo_mcore.config import ModelConfig, ParallelConfig
from dppo_mcore.data.packing import pack_groups
from dppo_mcore.learn.flops import Flops, batch_flops, generation_flops, language_flops, visible_pairs
from dppo_mcore.learn.state import Learner, build
from dppo_mcore.learn.step import logprobs
from dppo_mcore.model.config import load_qwen_config
from dppo_mcore.types import FramePlan, Media, PackedBatch, Prompt, PromptMedia, Sample, Turn
from tests.learn.batches import pack, random_questions
from tests.learn.exact import config


def issued(state: Learner, batch: PackedBatch) -> int:
    from flops import count_flops

    return count_flops(lambda: logprobs(state, [batch]))


@pytest.mark.usefixtures("single_rank")
def test_forward_operations(tiny_dir: str) -> None:
    """No more is counted than runs. On CPU somewhat more runs: attention by blocks, head rows in quanta of 128."""
    state = build(config(tiny_dir, ParallelConfig()))
    questions = random_questions(state.qwen, 10, 4, columns=(), longest=40)
    batch = pack(questions, state.qwen)
    found = batch_flops(batch, state.qwen)
    rows = -(-batch.targets_R.numel() // 128) * 128
    head = found.head * rows / batch.targets_R.numel()
    counted = found.language + found.vision + head
    assert counted <= issued(state, batch) <= 1.12 * counted
    text = pack([question for question in questions if question.grid is None], state.qwen)
    assert batch_flops(text, state.qwen).vision == 0.0


def test_generation_counts_what_is_fed(tiny_dir: str) -> None:
    """As a shared-prompt row of the answers without their last tokens; the head runs once for every token sampled."""
    qwen = load_qwen_config(tiny_dir)
    plan = FramePlan("/nowhere.mp4", "video", (0, 1, 2, 3), (0.0,) * 4, (56, 56), (2, 4, 4), 1.0)
    sample = Sample("q", "exact", (Turn("user", "<video>?"),), (Media("video", "/nowhere.mp4"),))
    pads = [qwen.vision_start_token_id, *[qwen.video_token_id] * 8, qwen.vision_end_token_id]
    prompt = Prompt(sample, (5, *pads, 6, 7), (PromptMedia(plan, torch.zeros(32, qwen.vision.patch_values)),))
    (fed,) = pack_groups([prompt], [[[8] * 4, [9] * 2]], None, qwen, 1000)
    work = batch_flops(fed, qwen)
    head = 2 * 8 * qwen.hidden_size * qwen.vocab_size
    assert generation_flops(prompt, [5, 3], qwen) == work.vision + work.language + head
    assert generation_flops(prompt, [], qwen) == pytest.approx(work.vision + language_flops(13, 13 * 14 // 2, qwen))


def test_training_operations() -> None:
    parts = Flops(vision=1.0, language=10.0, head=2.0, tokens=7)
    assert parts.training(ModelConfig(freeze_vision=True)) == 37.0
    assert parts.training(ModelConfig(freeze_vision=False)) == 39.0
    assert parts.training(ModelConfig(freeze_vision=True, freeze_language=True)) == 25.0
    assert (parts + parts).tokens == 14


def test_visible_pairs_follow_the_mask(tiny_dir: str) -> None:
    batch = pack(random_questions(load_qwen_config(tiny_dir), 5, 3), load_qwen_config(tiny_dir), multiple=16)
    segment, branch = batch.segments_L[:, None], batch.branches_L[:, None]
    sees = (segment == segment.T) & ((branch.T == 0) | (branch == branch.T)) & (segment >= 0)
    sees &= torch.ones_like(sees).tril()
    assert visible_pairs(batch) == (int((batch.segments_L >= 0).sum()), int(sees.sum()))
    padding = replace(batch, segments_L=torch.full_like(batch.segments_L, -1))
    assert visible_pairs(padding) == (0, 0)
