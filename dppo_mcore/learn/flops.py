"""Floating-point operations of training and generation, by part: what MFU and the step benchmark divide by.

A multiply-add counts as two. Attention counts the pairs that the mask lets through, so a shared prompt counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from dppo_mcore.config import ModelConfig
from dppo_mcore.model.config import QwenConfig
from dppo_mcore.types import PackedBatch, Prompt


@dataclass(frozen=True)
class Flops:
    """Forward operations of one micro-batch, or several."""

    vision: float = 0.0
    language: float = 0.0
    head: float = 0.0
    tokens: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Flops)))

    def training(self, model: ModelConfig) -> float:
        """Forward and backward; a frozen tower has no backward pass, frozen layers only one to their input."""
        language = 2.0 if model.freeze_language else 3.0
        return self.vision * (1.0 if model.freeze_vision else 3.0) + language * (self.language + self.head)

    @property
    def forward(self) -> float:
        """The forward pass alone."""
        return self.vision + self.language + self.head


def batch_flops(batch: PackedBatch, qwen: QwenConfig) -> Flops:
    """Forward operations of a micro-batch."""
    tokens, pairs = visible_pairs(batch)
    return Flops(
        vision=sum(vision_flops(grid, qwen) for grid in batch.grids),
        language=language_flops(tokens, pairs, qwen),
        head=2.0 * batch.targets_R.numel() * qwen.hidden_size * qwen.vocab_size,
        tokens=tokens,
    )


def total_flops(batches: Sequence[PackedBatch], qwen: QwenConfig) -> Flops:
    """Forward operations of several micro-batches."""
    return sum((batch_flops(batch, qwen) for batch in batches), Flops())


def generation_flops(prompt: Prompt, lengths: Sequence[int], qwen: QwenConfig) -> float:
    """Forward operations of sampling answers of so many tokens, the prompt and its media computed once for all.

    An answer's last token is sampled and never fed.
    """
    start = len(prompt.token_ids)
    fed = [max(length - 1, 0) for length in lengths]
    tokens = start + sum(fed)
    pairs = start * (start + 1) // 2 + sum(n * start + n * (n + 1) // 2 for n in fed)
    vision = sum(vision_flops(media.plan.grid, qwen) for media in prompt.media)
    return vision + language_flops(tokens, pairs, qwen) + 2.0 * sum(lengths) * qwen.hidden_size * qwen.vocab_size


def language_flops(tokens: int, pairs: int, qwen: QwenConfig) -> float:
    """Linear layers over tokens, attention over (query, key) pairs."""
    width = qwen.num_heads * qwen.head_dim
    keys = qwen.num_kv_heads * qwen.head_dim
    weights = qwen.hidden_size * (2 * width + 2 * keys + 3 * qwen.intermediate_size)
    return qwen.num_layers * (2.0 * tokens * weights + 4.0 * pairs * width)


def visible_pairs(batch: PackedBatch) -> tuple[int, int]:
    """Real tokens, and (query, key) pairs under the mask: causal within a branch, plus the shared prompt."""
    branches_L, segments_L = batch.branches_L.long(), batch.segments_L.long()
    width = int(branches_L.max()) + 1 if branches_L.numel() else 1
    real_L = segments_L >= 0
    sizes_SB = torch.bincount((segments_L * width + branches_L)[real_L]).double()
    sizes_SB = torch.nn.functional.pad(sizes_SB, (0, -sizes_SB.numel() % width)).view(-1, width)
    prompts_S, branches_SB = sizes_SB[:, 0], sizes_SB[:, 1:]
    pairs = (sizes_SB * (sizes_SB + 1) / 2).sum() + (branches_SB.sum(1) * prompts_S).sum()
    return int(sizes_SB.sum()), int(pairs)


def vision_flops(grid: tuple[int, int, int], qwen: QwenConfig) -> float:
    """Tower and merger for one medium: windows of at most `window_size` pixels, whole frames in the full blocks."""
    vision = qwen.vision
    frames, height, width = grid
    patches = frames * height * width
    block = vision.hidden_size * (4 * vision.hidden_size + 3 * vision.intermediate_size)
    side = vision.window_size // vision.patch_size
    windowed = sum(h * w * h * w for h in _tiles(height, side) for w in _tiles(width, side)) * frames
    whole = frames * (height * width) ** 2
    full = len(vision.full_attention_blocks)
    attention = 4.0 * vision.hidden_size * (full * whole + (vision.depth - full) * windowed)
    merged = vision.hidden_size * vision.merge_unit
    merger = patches / vision.merge_unit * (merged * merged + merged * vision.out_hidden_size)
    embed = patches * vision.patch_values * vision.hidden_size
    return 2.0 * (patches * vision.depth * block + embed + merger) + attention


def _tiles(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]
