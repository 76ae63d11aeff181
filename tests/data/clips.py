"""Synthetic clips whose every frame shows its own number, in every codec and container the loader meets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

BITS = 8


@dataclass(frozen=True)
class Codec:
    """How a codec is written."""

    encoder: str
    suffix: str
    pixels: str = "yuv420p"
    options: tuple[tuple[str, str], ...] = ()
    odd_pixels: str | None = None
    """Pixel format for odd sizes, where the usual one can't have them."""


CODECS = {
    "h264": Codec("libx264", "mp4", options=(("preset", "ultrafast"), ("bf", "3"), ("g", "24")), odd_pixels="yuv444p"),
    "hevc": Codec(
        "libx265", "mp4", options=(("preset", "ultrafast"), ("x265-params", "log-level=none:bframes=3:pools=none")),
        odd_pixels="yuv444p",
    ),
    "av1": Codec("libsvtav1", "mp4", options=(("preset", "12"), ("svtav1-params", "lp=1"))),
    "vp9": Codec("libvpx-vp9", "webm", options=(("deadline", "realtime"), ("cpu-used", "8"))),
    "vp8": Codec("libvpx", "webm", options=(("deadline", "realtime"), ("cpu-used", "8"))),
    "mjpeg": Codec("mjpeg", "mov", "yuvj420p"),
    "mpeg4": Codec("mpeg4", "mp4", options=(("bf", "2"), ("g", "24"))),
}  # fmt: skip


def picture(number: int, height: int, width: int) -> np.ndarray:
    """RGB picture [h, w, 3] with `number` as black and white bars, and a coloured edge that moves."""
    bars = [(number >> bit) & 1 for bit in range(BITS)]
    columns = np.repeat(bars, -(-width // BITS))[:width] * 190 + 30
    frame = np.broadcast_to(columns[None, :, None], (height, width, 3)).astype(np.uint8).copy()
    band = max(height // 6, 1)
    frame[:band] = (200, 60, number * 7 % 256)
    return frame


def read_number(frame_CHW: Tensor) -> int:
    """Inverse of `picture`, from a decoded frame of any size."""
    columns = frame_CHW[:, frame_CHW.shape[1] // 2 :, :].float().mean(dim=(0, 1)).numpy()
    centres = (np.arange(BITS) + 0.5) * len(columns) / BITS
    return sum(int(columns[int(centre)] > 125) << bit for bit, centre in enumerate(centres))


@contextmanager
def own_scheduling() -> Iterator[None]:
    """Give this thread its scheduling back at the end.

    SVT-AV1 under root makes its caller SCHED_FIFO 99, and all later threads and children inherit it: two of them that
    compute without a pause then hold two cores for ever.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_clip(
    path: str | Path,
    codec: str = "h264",
    frames: int = 40,
    fps: int = 8,
    size: tuple[int, int] = (64, 64),
    times: Sequence[float] | None = None,
    rotation: int = 0,
    streaming: bool = False,
    options: Mapping[str, str] | None = None,
    muxer: Mapping[str, str] | None = None,
    pixels: str | None = None,
) -> Path:
    """Write a clip of numbered frames; `times` in seconds makes the rate variable, `rotation` is counter-clockwise.

    `streaming` puts an MP4's index before its pictures; `options`, `muxer` and `pixels` replace the codec's usual ones.
    """
    how = CODECS[codec]
    height, width = size
    odd = height % 2 or width % 2
    layout = {"movflags": "faststart"} if streaming else {}
    with own_scheduling(), av.open(str(path), "w", options={**layout, **(muxer or {})}) as container:
        stream = container.add_stream(how.encoder, rate=fps, options=dict(options or how.options))
        stream.width, stream.height = width, height
        stream.pix_fmt = pixels or (how.odd_pixels if odd and how.odd_pixels else how.pixels)
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 1000 if times is not None else fps)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            frame.pts = number if times is None else round(times[number] * 1000)
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def write_audio(path: str | Path) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for number in range(8):
            sound = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)
