"""What the teacher sees: a sample's media as parts of an OpenAI-style message, frames as JPEG images or whole files."""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from dppo_mcore.types import Media, Sample

Frames = Callable[[Sample], Sequence[np.ndarray]]
"""Frames of each medium of a sample, uint8 [T, H, W, 3]; the trainer's own, so the teacher sees what the model saw."""
JPEG_QUALITY = 90


def media_parts(
    kind: Literal["frames", "video"], frames: Frames, most_frames: int = 64
) -> Callable[[Sample], list[Any]]:
    """A function from a sample to message parts. "video" sends clips as files, images stay images."""

    def parts(sample: Sample) -> list[dict[str, Any]]:
        if not sample.media:
            return []
        if kind == "video" and all(medium.start is None and medium.end is None for medium in sample.media):
            return [file_part(medium) for medium in sample.media]
        return [image_part(frame_HWC) for clip_THWC in frames(sample) for frame_HWC in thin(clip_THWC, most_frames)]

    return parts


def thin(clip_THWC: np.ndarray, most: int) -> np.ndarray:
    """At most `most` frames, evenly spread, first and last among them."""
    if len(clip_THWC) <= most:
        return clip_THWC
    return clip_THWC[np.linspace(0, len(clip_THWC) - 1, most).round().astype(int)]


def image_part(frame_HWC: np.ndarray) -> dict[str, Any]:
    """One frame as an image part."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame_HWC)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return {"type": "image_url", "image_url": {"url": _data_url("image/jpeg", buffer.getvalue())}}


def file_part(medium: Media) -> dict[str, Any]:
    """A whole file as a video or image part."""
    with open(medium.path, "rb") as file:
        content = file.read()
    fallback = "video/mp4" if medium.kind == "video" else "image/jpeg"
    url = _data_url(mimetypes.guess_type(medium.path)[0] or fallback, content)
    name = f"{medium.kind}_url"
    return {"type": name, name: {"url": url}}


def _data_url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
