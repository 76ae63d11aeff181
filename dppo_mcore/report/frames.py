"""Pictures for the sample browser: a few frames of the clips of at most so many samples, as small JPEGs."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

import av
from PIL import Image, UnidentifiedImageError

from dppo_mcore.report.blocks import Limits, SampleBlocks
from dppo_mcore.report.read import Run

FRAMES = 8
EDGE = 160
"""Longest edge of a picture in pixels; smaller ones keep their size."""


Seen = dict[tuple[Any, ...], list[tuple[float, str]]]
"""Pictures by path and window."""


def choose(run: Run, blocks: SampleBlocks, most: int) -> list[int]:
    """Places of the samples that get pictures: taught and unsolved ones first, the rest spread evenly."""
    places = range(len(blocks.keys))
    with_media = {key for (key,) in run.rows("SELECT key FROM samples WHERE media != '[]'")}
    usable = [place for place in places if blocks.keys[place] in with_media]
    taught = [place for place in usable if blocks.index["teacher"][place]][: most // 2]
    rest = [place for place in usable if place not in set(taught)]
    wanted = most - len(taught)
    step = max(1, len(rest) // wanted) if wanted else 1
    return [*taught, *rest[::step][:wanted]]


def _jpeg(picture: Image.Image) -> str:
    picture.thumbnail((EDGE, EDGE))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def clip_frames(path: str, start: float | None, end: float | None, count: int = FRAMES) -> list[tuple[float, str]]:
    """(second, JPEG) of `count` frames spread over a clip's window; fewer where the clip has fewer."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        base = float(stream.time_base or 1)
        length = stream.duration * base if stream.duration else (container.duration or 0) / av.time_base
        first, last = start or 0.0, min(end or length, length) or length
        wanted = [first + (last - first) * (k + 0.5) / count for k in range(count)]
        dense = (stream.frames or 10**9) <= 400
        found: list[tuple[float, str]] = []
        frames = container.decode(stream)
        for target in wanted:
            if not dense:
                container.seek(int(target / base), stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                if frame.time is not None and frame.time >= target - 1e-6:
                    found.append((round(frame.time, 2), _jpeg(frame.to_image())))
                    break
        return found


def frames_of(
    run: Run, blocks: SampleBlocks, limits: Limits, seen: Seen | None = None
) -> tuple[dict[int, list[list[tuple[float, str]]]], str]:
    """Pictures by place in the index, one list per medium, and a note on what is missing (empty if nothing is).

    `seen` holds what was decoded for an earlier page of the same run, and takes in what is decoded now.
    """
    deadline = time.monotonic() + limits.frame_seconds
    media = dict(run.rows("SELECT key, media FROM samples"))
    seen = {} if seen is None else seen
    found: dict[int, list[list[tuple[float, str]]]] = {}
    chosen = choose(run, blocks, limits.frame_samples)
    for done, place in enumerate(chosen):
        if time.monotonic() > deadline:
            return (
                found,
                f"pictures of {done} of {len(chosen)} samples: --frame-seconds {limits.frame_seconds:g} were up",
            )
        strips = []
        for medium in json.loads(media[blocks.keys[place]]):
            key = (medium["path"], medium.get("start"), medium.get("end"))
            if key not in seen:
                try:
                    seen[key] = _pictures(medium)
                except (OSError, av.FFmpegError, UnidentifiedImageError, IndexError):
                    seen[key] = []
            strips.append(seen[key])
        found[place] = strips
    failed = sum(not strip for strip in seen.values())
    return found, f"{failed} clips or images couldn't be read" if failed else ""


def _pictures(medium: dict[str, Any]) -> list[tuple[float, str]]:
    if medium["kind"] == "image":
        with Image.open(medium["path"]) as picture:
            return [(0.0, _jpeg(picture.copy()))]
    return clip_frames(medium["path"], medium.get("start"), medium.get("end"))
