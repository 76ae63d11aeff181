"""A prompt's media as an engine takes them: the trainer's embeddings and positions, shared once per group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dppo_mcore.rollout import wire
from dppo_mcore.rollout.base import EngineError
from dppo_mcore.types import FramePlan, Prompt, PromptMedia, Sample

if TYPE_CHECKING:
    from dppo_mcore.model.config import QwenConfig


def media_key(prompt: Prompt) -> tuple[Any, ...]:
    """What a prompt's embeddings depend on: the planned frames and, where decoded, the patches' own content."""
    from dppo_mcore.rollout.fingerprint import fingerprint

    return tuple(
        (item.plan.path, item.plan.indices, item.plan.grid, None if item.patches is None else fingerprint(item.patches))
        for item in prompt.media
    )


def positions(prompt: Prompt, qwen: QwenConfig) -> Tensor:
    """Rotary positions of the prompt, int64 [3, L]."""
    from dppo_mcore.model.rope import mrope_positions

    plans = [item.plan for item in prompt.media]
    return mrope_positions(
        prompt.token_ids, [p.grid for p in plans], [p.seconds_per_grid for p in plans], qwen, prompt.sample.id
    )


class Encoder:
    """Encodes prompts' media on the first pipeline stage; all its tensor-parallel ranks call it together."""

    def __init__(self, chunks: Sequence[Any], qwen: QwenConfig, cache_bytes: int) -> None:
        self.qwen = qwen
        self._tower = next((chunk for chunk in chunks if getattr(chunk, "vision", None) is not None), None)
        self._cache: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._limit = cache_bytes
        self._held = 0

    @torch.no_grad()
    def embeddings(self, prompt: Prompt) -> Tensor | None:
        """Merged embeddings [M, H] of all media in order, on the host; None on ranks without the tower."""
        if self._tower is None:
            return None
        key = media_key(prompt)
        if self._all_hold(key):
            self._cache.move_to_end(key)
            return self._cache[key]
        if any(item.patches is None for item in prompt.media):
            raise EngineError(f"sample {prompt.sample.id}: its media are not decoded; the engine needs their patches")
        device = next(self._tower.parameters()).device
        patches_P = torch.cat([item.patches for item in prompt.media]).to(device)
        embeddings_MH = self._tower.encode_media(patches_P, [item.plan.grid for item in prompt.media]).cpu()
        self._keep(key, embeddings_MH)
        return embeddings_MH

    def _all_hold(self, key: tuple[Any, ...]) -> bool:
        """Whether every tensor-parallel rank has it: they encode together, and one may have decoded other pixels."""
        from megatron.core import parallel_state

        held = key in self._cache
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            return held
        all_hold = torch.tensor(held, dtype=torch.int32, device=next(self._tower.parameters()).device)
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(all_hold, torch.distributed.ReduceOp.MIN, group=group)
        return bool(all_hold)

    def clear(self) -> None:
        """Forget everything; needed whenever the tower has learnt."""
        self._cache.clear()
        self._held = 0

    def _keep(self, key: tuple[Any, ...], embeddings_MH: Tensor) -> None:
        if embeddings_MH.nbytes > self._limit:
            return
        if key in self._cache:
            self._held -= self._cache.pop(key).nbytes
        self._cache[key] = embeddings_MH
        self._held += embeddings_MH.nbytes
        while self._held > self._limit:
            _, oldest = self._cache.popitem(last=False)
            self._held -= oldest.nbytes


def share_embeddings(
    prompt: Prompt, embeddings_MH: Tensor, positions_3L: Tensor, merge_unit: int
) -> tuple[wire.SharedBuffer, dict[str, Any]]:
    """Put a prompt's embeddings, grids and positions into shared memory; the handle names them per modality."""
    tensors: dict[str, Tensor] = {
        "positions": positions_3L,
        "delta": (positions_3L.max() + 1 - positions_3L.shape[1]).reshape(1),
    }
    counts = [item.plan.grid[0] * item.plan.grid[1] * item.plan.grid[2] // merge_unit for item in prompt.media]
    pieces = embeddings_MH.split(counts)
    kinds = _by_kind(prompt, tensors)
    for kind in kinds:
        tensors[f"{kind}.embeddings"] = torch.cat(
            [piece for piece, item in zip(pieces, prompt.media, strict=True) if item.plan.kind == kind]
        )
    buffer, handle = wire.share(tensors)
    return buffer, {**handle, "kinds": kinds}


def share_patches(prompt: Prompt) -> tuple[wire.SharedBuffer, dict[str, Any]]:
    """The same with raw patches, for an engine that encodes media itself."""
    tensors: dict[str, Tensor] = {}
    kinds = _by_kind(prompt, tensors)
    for kind in kinds:
        tensors[f"{kind}.patches"] = torch.cat(
            [item.patches for item in prompt.media if item.plan.kind == kind and item.patches is not None]
        )
    buffer, handle = wire.share(tensors)
    return buffer, {**handle, "kinds": kinds}


def _by_kind(prompt: Prompt, tensors: dict[str, Tensor]) -> list[str]:
    """Add grids and seconds per modality; returns the modalities present."""
    kinds = [kind for kind in ("image", "video") if any(item.plan.kind == kind for item in prompt.media)]
    for kind in kinds:
        plans = [item.plan for item in prompt.media if item.plan.kind == kind]
        tensors[f"{kind}.grids"] = torch.tensor([plan.grid for plan in plans])
        if kind == "video":
            tensors["video.seconds"] = torch.tensor([float(plan.seconds_per_grid or 0.0) for plan in plans])
    return kinds


def probe_clip(qwen: QwenConfig) -> tuple[Prompt, tuple[int, ...]]:
    """A clip of eight unlike frames between a few text tokens, and an answer to score after it."""
    grid, seconds = (4, 8, 8), 1.0
    merged = grid[0] * grid[1] * grid[2] // qwen.vision.merge_unit
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(grid[0] * grid[1] * grid[2], qwen.vision.patch_values, generator=generator)
    frames = tuple(range(2 * grid[0]))
    size = (grid[1] * qwen.vision.patch_size, grid[2] * qwen.vision.patch_size)
    plan = FramePlan("probe", "video", frames, tuple(map(float, frames)), size, grid, seconds)
    ids = (1, 2, qwen.vision_start_token_id, *[qwen.video_token_id] * merged, qwen.vision_end_token_id, 3, 4)
    return Prompt(Sample("probe", "exact", ()), ids, (PromptMedia(plan, patches),)), tuple(range(5, 21))
