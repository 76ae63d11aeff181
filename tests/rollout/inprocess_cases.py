"""Prompts, engines and rank functions for the embedded engine's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dppo_mcore.config import Config, ModelConfig, ParallelConfig, RolloutConfig
from dppo_mcore.model.config import QwenConfig, load_qwen_config
from dppo_mcore.model.model import build_model
from dppo_mcore.model.weights import load_hf_weights
from dppo_mcore.rollout.base import GenerationRequest, Sampling, banned_ids
from dppo_mcore.rollout.inprocess import InProcessEngine
from dppo_mcore.types import FramePlan, Media, Prompt, PromptMedia, Rollout, Sample

TEXT_IDS = 250
"""Ids below this are plain text in the tiny tokenizer."""


def tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def engine(
    folder: str, parallel: ParallelConfig | None = None, model: dict[str, Any] | None = None, **rollout: Any
) -> InProcessEngine:
    """An engine over a model loaded from `folder`; the parallel state must fit `parallel`."""
    qwen = load_qwen_config(folder)
    config = Config(
        parallel=parallel or ParallelConfig(),
        model=ModelConfig(**{"dtype": "fp32", **(model or {})}),
        rollout=RolloutConfig(**rollout),
    )
    chunks = build_model(qwen, config)
    load_hf_weights(chunks, folder, qwen)
    made = InProcessEngine(config, qwen, chunks, tokenizer(folder))
    made.start()
    made.update_weights(1)
    return made


def text_prompt(number: int, length: int) -> Prompt:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(5, TEXT_IDS, (length,), generator=generator).tolist()
    return Prompt(Sample(f"text-{number}", "exact", ()), tuple(ids))


def media_prompt(number: int, qwen: QwenConfig, *media: tuple[str, tuple[int, int, int], float | None]) -> Prompt:
    """Text, then each medium (kind, grid, seconds per grid) followed by text."""
    generator = torch.Generator().manual_seed(1000 + number)

    def text(n: int) -> list[int]:
        return torch.randint(5, TEXT_IDS, (n,), generator=generator).tolist()

    ids, items = text(4), []
    for kind, (t, h, w), seconds in media:
        pad = qwen.video_token_id if kind == "video" else qwen.image_token_id
        ids += [qwen.vision_start_token_id, *[pad] * (t * h * w // 4), qwen.vision_end_token_id, *text(3)]
        frames = 2 * t if kind == "video" else 1
        times = tuple(i * (seconds or 0.0) / 2 for i in range(frames))
        plan = FramePlan(f"/{number}", kind, tuple(range(frames)), times, (h * 14, w * 14), (t, h, w), seconds)
        items.append(PromptMedia(plan, torch.randn(t * h * w, qwen.vision.patch_values, generator=generator)))
    sample = Sample(f"media-{number}", "exact", (), tuple(Media(item.plan.kind, item.plan.path) for item in items))
    return Prompt(sample, tuple(ids), tuple(items))


def mixed_prompts(qwen: QwenConfig) -> list[Prompt]:
    """Texts of uneven length, an image, a clip at an odd rate, and both with text between."""
    return [
        text_prompt(0, 7),
        media_prompt(1, qwen, ("image", (1, 4, 6), None)),
        text_prompt(2, 31),
        media_prompt(3, qwen, ("video", (3, 4, 4), 0.7)),
        media_prompt(4, qwen, ("image", (1, 2, 4), None), ("video", (2, 4, 6), 1.5)),
    ]


def requests(prompts: list[Prompt], n: int = 3, seed: int = 5) -> list[GenerationRequest]:
    return [GenerationRequest(prompt.sample.id, prompt, n, seed=seed) for prompt in prompts]


def by_key(rollouts: Any) -> dict[tuple[str, int], Rollout]:
    found = {}
    for rollout in rollouts:
        assert (rollout.sample_id, rollout.index) not in found
        found[rollout.sample_id, rollout.index] = rollout
    return found


def layout_rollouts(folder: str, parallel: ParallelConfig, sampling: Sampling, n: int = 3) -> dict[str, Any]:
    """What one rank of a layout generates and scores; prompts differ per data-parallel rank."""
    from megatron.core import parallel_state

    from dppo_mcore.runtime import parallel as runtime

    runtime.reinit(parallel, seed=0)
    made = engine(folder, parallel)
    qwen = load_qwen_config(folder)
    replica = parallel_state.get_data_parallel_rank()
    prompts = mixed_prompts(qwen)
    prompts = [replace(p, sample=replace(p.sample, id=f"{p.sample.id}/{replica}")) for p in prompts[replica:]]
    rollouts = list(made.generate(requests(prompts, n), sampling))
    first = [rollout for rollout in rollouts if rollout.index == 0]
    prompt_of = {prompt.sample.id: prompt for prompt in prompts}
    scores = made.score([prompt_of[r.sample_id] for r in first], [r.token_ids for r in first])
    return {"replica": replica, "rollouts": rollouts, "scores": scores}


def default_sampling(qwen: QwenConfig, **changes: Any) -> Sampling:
    return replace(Sampling(max_tokens=12, banned_token_ids=banned_ids(qwen)), **changes)
