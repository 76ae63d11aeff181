"""Which frames of a medium are seen, and at what size: one plan for the trainer and every engine.

The rule, for a clip window of D seconds (the clip's start and end, then the horizon):
- n = D * fps rounded to an even number, at least 2, at most `max_frames` and the window's frames (evened down);
- frame i is the one on screen at window start + i * D / n, so a slow or variable frame rate repeats frames;
- seconds per temporal patch is 2 * D / n, or 2 / fps where that is within 1%.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dppo_mcore.config import DataConfig
from dppo_mcore.data import errors
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.images import image_size
from dppo_mcore.data.patches import Geometry, smart_resize
from dppo_mcore.data.probe import ClipInfo, probe
from dppo_mcore.types import FramePlan, Media

# A container that rounds to milliseconds must not move a frame behind its own time.
TIME_SLACK = 1.5e-3


def plan_media(media: Media, data: DataConfig, horizon: float | None, geometry: Geometry) -> FramePlan:
    """Plan one image or clip; `horizon` in seconds (None: no bound). Raises `MediaError` for an unusable one."""
    if media.kind == "image":
        return _plan_image(media, data, geometry)
    return _plan_clip(media, probe(media.path), data, horizon, geometry)


def plan_key(plan: FramePlan) -> str:
    """A stable name of a plan, equal for equal pixels."""
    if plan.kind == "image":
        return f"{plan.path}@{plan.size[0]}x{plan.size[1]}"
    middle = zlib.crc32(np.array(plan.indices, np.int64).tobytes())
    return (
        f"{plan.path}@{plan.size[0]}x{plan.size[1]}:{plan.indices[0]}-{plan.indices[-1]}/{len(plan.indices)}/{middle:x}"
    )


def clip_window(
    media: Media, duration: float, horizon: float | None, keep: Literal["end", "start", "middle"]
) -> tuple[float, float]:
    """Seconds of the clip that are used: its own start and end, then of a longer one the horizon's worth at `keep`."""
    start = media.start or 0.0
    end = duration if media.end is None else min(media.end, duration)
    if start >= duration or end <= start:
        raise MediaError(
            media.path,
            errors.WINDOW,
            f"{media.start}-{media.end} s of a clip of {duration:.2f} s; correct start and end",
        )
    spare = 0.0 if horizon is None else max(end - start - horizon, 0.0)
    before = {"end": spare, "start": 0.0, "middle": spare / 2}[keep]
    return start + before, end - (spare - before)


def too_long(data: DataConfig, horizons: Sequence[float], geometry: Geometry, limit: int) -> str:
    """A warning where the largest clip that is allowed takes more than `limit` tokens; empty where none does."""
    for horizon in sorted(horizons, reverse=True):
        count = max(min(round(horizon * data.fps / 2), data.max_frames // 2) * 2, 2)
        pixels = _most_pixels(data, count)
        patches = count // geometry.temporal
        tokens = patches * (pixels // geometry.factor**2)
        if tokens > limit:
            return (
                f"max_prompt_tokens: {limit} are fewer than the {tokens} that a clip of {horizon:g} s may take "
                f"({count} frames of {pixels} pixels); clips with frames above {limit // patches * geometry.factor**2} "
                "pixels will be refused: lower max_clip_pixels, max_pixels, max_frames or fps, or raise "
                "max_prompt_tokens"
            )
    return ""


def _plan_clip(media: Media, info: ClipInfo, data: DataConfig, horizon: float | None, geometry: Geometry) -> FramePlan:
    start, end = clip_window(media, info.duration, horizon, data.horizon_keep)
    first, last = np.searchsorted(info.times - TIME_SLACK, (start, end - 2 * TIME_SLACK), side="right")
    inside = max(int(last) - max(int(first) - 1, 0), 1)
    count = max(min(round((end - start) * data.fps / 2) * 2, data.max_frames // 2 * 2, inside // 2 * 2), 2)
    spacing = (end - start) / count
    targets_T = start + np.arange(count) * spacing
    indices_T = np.clip(np.searchsorted(info.times - TIME_SLACK, targets_T, side="right") - 1, 0, len(info.times) - 1)
    height, width = (info.width, info.height) if info.rotation % 180 else (info.height, info.width)
    size = _fit(media.path, height, width, count, data, geometry)
    return FramePlan(
        path=media.path,
        kind="video",
        indices=tuple(indices_T.tolist()),
        times=tuple(np.round(info.times[indices_T], 6).tolist()),
        size=size,
        grid=(count // geometry.temporal, size[0] // geometry.patch, size[1] // geometry.patch),
        seconds_per_grid=_seconds_per_grid(spacing, data.fps, geometry.temporal),
        rotation=info.rotation,
    )


def _seconds_per_grid(spacing: float, fps: float, temporal: int) -> float:
    """Rounding in containers must not shift positions: close to the asked rate, the asked rate it is."""
    asked = temporal / fps
    real = temporal * spacing
    return asked if abs(real - asked) <= 0.01 * asked else round(real, 6)


def _fit(path: str, height: int, width: int, count: int, data: DataConfig, geometry: Geometry) -> tuple[int, int]:
    """Size within the frame's pixel budget and its share of the clip's."""
    try:
        return smart_resize(height, width, geometry.factor, data.min_pixels, _most_pixels(data, count))
    except ValueError as error:
        raise MediaError(path, errors.SHAPE, str(error)) from error


def _most_pixels(data: DataConfig, count: int) -> int:
    return max(min(data.max_pixels, data.max_clip_pixels // count), int(data.min_pixels * 1.05))


def _plan_image(media: Media, data: DataConfig, geometry: Geometry) -> FramePlan:
    size = _fit(media.path, *image_size(media.path), 1, data, geometry)
    return FramePlan(
        path=media.path,
        kind="image",
        indices=(0,),
        times=(0.0,),
        size=size,
        grid=(1, size[0] // geometry.patch, size[1] // geometry.patch),
        seconds_per_grid=None,
    )
