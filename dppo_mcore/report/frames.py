"""Pictures for the sample browser: a few frames of the clips of at most so many samples, as small JPEGs.

They are what the model sees: the first stream that is no cover, times from its first frame, upright, 16 bits scaled
to 8. `dppo_mcore.data` says so for the trainer; its probe is used here, its readers of pixels need torch.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from dppo_mcore.data import errors
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.probe import PICTURES, ClipInfo, opened, probe, video_stream
from dppo_mcore.report.blocks import Limits, SampleBlocks
from dppo_mcore.report.read import Run

FRAMES = 8
EDGE = 160
"""Longest edge of a picture in pixels; smaller ones keep their size."""
TIME_SLACK = 1.5e-3
"""Containers round times to milliseconds; a frame is on screen from its own time on."""


Seen = dict[tuple[Any, ...], list[tuple[float, str]]]
"""Pictures by path and window."""


def choose(run: Run, blocks: SampleBlocks, most: int) -> list[int]:
    """Places of the samples that get pictures, of those with details: taught ones first, the rest spread evenly."""
    places = [place for place, number in enumerate(blocks.index["block"]) if number >= 0]
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
    picture.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def image_picture(path: str) -> Image.Image:
    """The first picture of an image file, upright, in 8-bit RGB."""
    with Image.open(path, formats=PICTURES) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F"):
            raise MediaError(path, errors.BAD_FRAMES, f"mode {upright.mode} has no known range")
        if upright.mode.startswith("I;16"):
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")


def clip_frames(path: str, start: float | None, end: float | None, count: int = FRAMES) -> list[tuple[float, str]]:
    """(second, JPEG) of `count` frames spread over a clip's window; fewer where the clip has fewer."""
    info = probe(path)
    first, last = start or 0.0, info.duration if end is None else min(end, info.duration)
    if first >= last:
        raise MediaError(path, errors.WINDOW)
    targets_T = first + (np.arange(count) + 0.5) * (last - first) / count
    shown_T = np.searchsorted(info.times - TIME_SLACK, targets_T, side="right") - 1
    wanted = set(np.maximum(shown_T, 0).tolist())
    return [
        (round(float(info.times[number]), 2), _jpeg(frame.to_image().rotate(-info.rotation, expand=True)))
        for number, frame in _decoded(path, info, wanted)
    ]


def _decoded(path: str, info: ClipInfo, wanted: set[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """The wanted frames by their number; what lies between key frames and holds none isn't decoded."""
    numbers = None if info.pts is None else {int(pts): number for number, pts in enumerate(info.pts)}
    needed = _needed_keys(info, wanted) if info.closed else None
    left, count, idle = set(wanted), 0, False
    with opened(path) as container:
        for packet in container.demux(video_stream(path, container)):
            place = numbers.get(packet.pts) if numbers else None
            if needed is not None and place is not None and info.keyframes[place]:
                idle = place not in needed
            if idle and packet.size:
                continue
            for frame in packet.decode():
                number = count if numbers is None else numbers.get(frame.pts, -1)
                count += 1
                if number in left:
                    left.remove(number)
                    yield number, frame
                if not left:
                    return


def _needed_keys(info: ClipInfo, wanted: set[int]) -> set[int]:
    """Key frames from which the wanted frames are decoded."""
    keys = np.flatnonzero(info.keyframes)
    places = np.searchsorted(keys, sorted(wanted), side="right") - 1
    return set(keys[np.maximum(places, 0)].tolist())


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
                except Exception:  # whatever a damaged file leads its readers into, the report is made
                    seen[key] = []
            strips.append(seen[key])
        found[place] = strips
    failed = sum(not strip for strip in seen.values())
    return found, f"{failed} clips or images couldn't be read" if failed else ""


def _pictures(medium: dict[str, Any]) -> list[tuple[float, str]]:
    if medium["kind"] == "image":
        return [(0.0, _jpeg(image_picture(medium["path"])))]
    return clip_frames(medium["path"], medium.get("start"), medium.get("end"))
