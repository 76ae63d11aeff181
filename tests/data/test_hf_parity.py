"""Patches and token ids equal those of Hugging Face's torchvision-backed processors, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from dppo_mcore.config import DataConfig
from dppo_mcore.data.patches import Geometry, normalise, patchify, resize, smart_resize
from dppo_mcore.data.qwen import Processor
from dppo_mcore.types import Media, Sample, Turn
from tests.data.clips import write_clip

Oracle = Callable[[list[dict[str, Any]]], list[Any]]

SIZES = [
    (28, 28), (29, 27), (27, 29), (1, 1), (3, 150), (150, 3), (13, 31), (56, 56), (57, 83), (100, 100),
    (131, 217), (240, 320), (241, 319), (360, 640), (480, 640), (641, 479), (720, 1280), (1080, 1920),
    (17, 900), (63, 1999),
]  # fmt: skip
LENGTHS = [1, 2, 3, 4, 5, 7, 8]
BUDGETS = [(3136, 602112), (3136, 20000), (100352, 602112), (784, 784)]


def cases() -> list[dict[str, Any]]:
    """40 odd, tiny and huge sizes over images and videos of odd and even lengths, under four pixel budgets."""
    made = []
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate(SIZES):
        for kind in ("image", "video"):
            length = 1 if kind == "image" else LENGTHS[number % len(LENGTHS)]
            if height * width > 500000:
                length = min(length, 2)
            low, high = BUDGETS[(number + (kind == "video")) % len(BUDGETS)]
            frames = torch.randint(0, 256, (length, 3, height, width), dtype=torch.uint8, generator=generator)
            made.append({"kind": kind, "frames": frames, "min_pixels": low, "max_pixels": high})
    for length in (1, 3, 6, 9):
        smooth = torch.arange(3 * 90 * 70).reshape(1, 3, 90, 70).add(torch.arange(length).view(-1, 1, 1, 1)) // 7 % 256
        made.append({"kind": "video", "frames": smooth.to(torch.uint8), "min_pixels": 3136, "max_pixels": 50000})
    return made


def test_patches_equal_hf(oracle: Oracle) -> None:
    """44 cases, compared without tolerance."""
    geometry = Geometry()
    asked = cases()
    for case, answer in zip(asked, oracle(asked), strict=True):
        frames_TCHW = case["frames"]
        size = smart_resize(*frames_TCHW.shape[-2:], 28, case["min_pixels"], case["max_pixels"])
        patches_PV = normalise(patchify(resize(frames_TCHW, size), geometry), geometry)
        label = f"{case['kind']} {tuple(frames_TCHW.shape)}"
        assert answer["grid"] == [[-(-len(frames_TCHW) // 2), size[0] // 14, size[1] // 14]], label
        assert torch.equal(patches_PV, answer["patches"]), label


def test_token_ids_and_pixels_equal_hf(oracle: Oracle, tiny_dir: str, tmp_path: Any) -> None:
    """Whole samples, from files: images, clips, both, several turns, with and without an answer."""
    clips = [write_clip(tmp_path / f"{n}.mp4", frames=24 + 8 * n, fps=8, size=(60 + 8 * n, 96)) for n in range(2)]
    pictures = []
    for n in range(2):
        pictures.append(tmp_path / f"{n}.png")
        noise = torch.randint(0, 256, (50 + n, 71, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        Image.fromarray(noise.numpy()).save(pictures[-1])
    image = [Media("image", str(path)) for path in pictures]
    video = [Media("video", str(path)) for path in clips]
    samples = [
        Sample("text", "exact", (Turn("user", "How many blocks?\n\n  3 + 4 = ?"),), answer="7"),
        Sample("image", "exact", (Turn("user", "<image>Where is the cup?"),), (image[0],), answer="(0.4, 0.5)"),
        Sample("late", "exact", (Turn("user", "Look: <image> and <image>\nWhat differs?"),), tuple(image), answer="B"),
        Sample("video", "exact", (Turn("user", "<video>Was it done?"),), (video[0],), answer="yes"),
        Sample("system", "exact", (Turn("system", "Be brief."), Turn("user", "<video>")), (video[1],), answer=" no"),
        Sample("mixed", "exact", (Turn("user", "<image>,<video>and <video>?"),), (image[1], *video), answer="数字 Wör"),
        Sample(
            "turns", "exact",
            (Turn("user", "<image>What is it?"), Turn("assistant", "A cup."), Turn("user", "And <image>?")),
            (image[0], image[1]), answer="<think>It moves.</think>\n<answer>A box</answer>",
        ),
    ]  # fmt: skip
    data = DataConfig(min_pixels=3136, max_pixels=6000)
    processor = Processor(tiny_dir, data)
    asked, ours = [], []
    for sample in samples:
        for with_answer in (False, True):
            ours.append(processor.conversation(sample) if with_answer else processor.prompt(sample))
            plans = [media.plan for media in ours[-1].media]
            turns = (*sample.turns, Turn("assistant", sample.answer or "")) if with_answer else sample.turns
            asked.append(
                {
                    "kind": "chat",
                    "messages": [{"role": turn.role, "content": parts(turn)} for turn in turns],
                    "add_generation_prompt": not with_answer,
                    "images": [raw(processor, plan) for plan in plans if plan.kind == "image"],
                    "videos": [raw(processor, plan) for plan in plans if plan.kind == "video"],
                    "rates": [2.0 / plan.seconds_per_grid for plan in plans if plan.seconds_per_grid],
                    "min_pixels": 28 * 28,
                    "max_pixels": 6000,
                }
            )
    for case, prompt, answer in zip(asked, ours, oracle(asked), strict=True):
        assert list(prompt.token_ids) == answer["ids"], answer["text"]
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            patches = [media.patches for media in prompt.media if media.plan.kind == kind]
            assert not patches or torch.equal(torch.cat(patches), answer[name])
        if case["videos"]:
            seconds = [media.plan.seconds_per_grid for media in prompt.media if media.plan.kind == "video"]
            assert answer["second_per_grid_ts"].tolist() == pytest.approx(seconds)


def parts(turn: Turn) -> list[dict[str, str]] | str:
    """A turn as transformers wants it."""
    import re

    pieces = re.split(r"<(image|video)>", turn.content)
    if len(pieces) == 1:
        return turn.content
    made = [{"type": piece} if n % 2 else {"type": "text", "text": piece} for n, piece in enumerate(pieces)]
    return [part for part in made if part.get("text") != ""]


def raw(processor: Processor, plan: Any) -> torch.Tensor:
    """The planned frames at their planned size, which HF then keeps."""
    frames_TCHW = processor.decoder(plan)
    return frames_TCHW[0] if plan.kind == "image" else frames_TCHW
