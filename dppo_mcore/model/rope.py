"""Multimodal rotary positions: three rows (time, height, width) per token.

Text advances all three rows together. A medium starts at the position after the text before it; its tokens carry
time, row and column offsets from there, time in units of 1 / tokens_per_second of real time. Text after a medium
continues at the largest position so far, over all three rows, plus one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.runtime.errors import UserError

Grid = tuple[int, int, int]


def mrope_positions(
    token_ids: Sequence[int] | Tensor,
    grids: Sequence[Grid],
    seconds_per_grid: Sequence[float | None],
    qwen: QwenConfig,
    name: str = "",
) -> Tensor:
    """Positions of one sequence, int64 [3, L].

    `grids` (t, h, w in patches) and `seconds_per_grid` (None for an image) name the media in order of appearance.
    `name` is the sample's, for errors.
    """
    ids_L = torch.as_tensor(token_ids, dtype=torch.int64).cpu()
    where = f"sample {name}: " if name else ""
    if len(grids) != len(seconds_per_grid):
        raise UserError(f"{where}{len(grids)} grids but {len(seconds_per_grid)} seconds_per_grid")
    runs = media_runs(ids_L, qwen)
    tokens = sum(end - start for start, end, _ in runs)
    merge = qwen.vision.spatial_merge_size
    for grid in grids:
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise UserError(f"{where}grid {grid} does not divide into {merge} x {merge} patches a token")
    counts = [t * (h // merge) * (w // merge) for t, h, w in grids]
    if tokens != sum(counts):
        raise UserError(f"{where}{tokens} media tokens but {len(grids)} media with {sum(counts)} features")

    pieces: list[Tensor] = []
    at = 0  # tokens done
    following = 0  # next free position
    queue = list(zip(grids, counts, seconds_per_grid, strict=True))
    for start, end, is_video in runs:
        pieces.append(_text(start - at, following))
        following += start - at
        at = start
        while at < end:
            grid, count, seconds = queue.pop(0)
            if at + count > end:
                raise UserError(f"{where}medium with grid {grid} needs {count} tokens, {end - at} are there")
            if is_video and seconds is None:
                raise UserError(f"{where}a video has no seconds_per_grid; its temporal positions would be wrong")
            if is_video and not (grid[0] == 1 and seconds == 0 or 0 < seconds < math.inf):
                raise UserError(f"{where}a video has seconds_per_grid {seconds}, no time between its frames")
            if not is_video and seconds is not None:
                raise UserError(f"{where}image tokens stand where a video with grid {grid} is given")
            if not is_video and grid[0] != 1:
                raise UserError(f"{where}image tokens with grid {grid}, more than one frame")
            piece_3M = _medium(grid, seconds if is_video else None, qwen) + following
            pieces.append(piece_3M)
            following = int(piece_3M.max()) + 1
            at += count
    pieces.append(_text(len(ids_L) - at, following))
    return torch.cat(pieces, dim=1)


def media_runs(ids_L: Tensor, qwen: QwenConfig) -> list[tuple[int, int, bool]]:
    """Runs of equal media tokens as (start, end, is video); adjacent media of one kind make one run."""
    kind_L = (ids_L == qwen.image_token_id).to(torch.int8) + 2 * (ids_L == qwen.video_token_id).to(torch.int8)
    edges = torch.nonzero(torch.diff(kind_L, prepend=kind_L.new_zeros(1), append=kind_L.new_zeros(1))).flatten()
    bounds = edges.tolist()
    return [(a, b, bool(kind_L[a] == 2)) for a, b in zip(bounds, bounds[1:], strict=False) if kind_L[a]]


def _text(length: int, start: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, length)


def _medium(grid: Grid, seconds: float | None, qwen: QwenConfig) -> Tensor:
    """Offsets [3, t * h/m * w/m] of one medium from its first position."""
    t, h, w = grid
    h, w = h // qwen.vision.spatial_merge_size, w // qwen.vision.spatial_merge_size
    rate = 0.0 if seconds is None else seconds * qwen.vision.tokens_per_second
    time_T = torch.tensor([math.floor(index * rate) for index in range(t)])
    shape = (t, h, w)
    return torch.stack(
        [
            time_T.view(t, 1, 1).expand(shape).flatten(),
            torch.arange(h).view(1, h, 1).expand(shape).flatten(),
            torch.arange(w).view(1, 1, w).expand(shape).flatten(),
        ]
    )
