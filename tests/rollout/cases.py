"""Prompts for engine tests: text, images and clips of several rates and lengths, with random patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from dppo_mcore.config import Config, ModelConfig, ParallelConfig, RolloutConfig, RunConfig
from dppo_mcore.model.config import QwenConfig
from dppo_mcore.types import FramePlan, Prompt, PromptMedia, Sample

Medium = tuple[Literal["image", "video"], tuple[int, int, int], float | None]


class Spelling:
    """A tokenizer of sorts: one character per id, so that texts are readable in failures."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids as letters; special ids (590 and above of the tiny vocabulary's 590..639) vanish."""
        return "".join(chr(97 + token % 26) for token in token_ids if not 590 <= token < 640)


def prompt(qwen: QwenConfig, name: str, seed: int, media: Sequence[Medium] = (), text: int = 8) -> Prompt:
    """Random words around media."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(0, 512, (count,), generator=generator).tolist()

    ids, items = words(text), []
    for number, (kind, grid, seconds) in enumerate(media):
        pad = qwen.image_token_id if kind == "image" else qwen.video_token_id
        t, h, w = grid
        count = t * h * w // qwen.vision.merge_unit
        ids += [qwen.vision_start_token_id, *[pad] * count, qwen.vision_end_token_id, *words(3)]
        frames = tuple(range(2 * t)) if kind == "video" else (0,)
        plan = FramePlan(
            f"/clips/{name}-{number}", kind, frames, tuple(map(float, frames)), (14 * h, 14 * w), grid, seconds
        )
        patches = torch.randn(t * h * w, qwen.vision.patch_values, generator=generator)
        items.append(PromptMedia(plan, patches))
    return Prompt(Sample(name, "exact", ()), tuple(ids), tuple(items))


def videos(qwen: QwenConfig) -> list[Prompt]:
    """20 clips of 2 to 16 frames at rates from 0.5 to 8 frames per second."""
    frames, rates = (2, 4, 6, 10, 16), (0.5, 1.0, 4.0, 8.0)
    sizes = ((4, 4), (4, 6), (6, 4), (8, 4))
    return [
        prompt(qwen, f"clip-{f}-{r}", 100 + i, [("video", (f // 2, *sizes[i % 4]), 2.0 / r)])
        for i, (f, r) in enumerate((f, r) for f in frames for r in rates)
    ]


def mixed(qwen: QwenConfig) -> list[Prompt]:
    """32 prompts: text, one or two images, a clip, a clip beside an image, two clips."""
    image: Medium = ("image", (1, 4, 6), None)
    clip: Medium = ("video", (2, 4, 4), 1.0)
    fast: Medium = ("video", (3, 6, 4), 0.25)
    kinds: list[list[Medium]] = [[], [image], [clip], [], [image, image], [fast], [image, clip], [clip, fast]]
    return [prompt(qwen, f"mixed-{i}", 300 + i, kinds[i % len(kinds)], text=5 + i) for i in range(32)]


def config(model_dir: str, run: str, python: str = "", **changes: object) -> Config:
    """A configuration for SGLang on this machine; `changes` go to the section that has the field."""
    whole = Config(
        run=RunConfig(model=model_dir, run=run),
        model=ModelConfig(dtype="fp32"),
        parallel=ParallelConfig(),
        rollout=RolloutConfig(
            rollout_engine="sglang",
            rollout_python=python,
            max_prompt_tokens=512,
            max_response_tokens=16,
            engine_options=("chat_template=qwen2-vl",),
        ),
    )
    for name, value in changes.items():
        section = next(s for s in ("run", "parallel", "model", "rollout") if hasattr(getattr(whole, s), name))
        whole = replace(whole, **{section: replace(getattr(whole, section), **{name: value})})
    return whole
