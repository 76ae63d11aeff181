"""From a scene to frames, and from frames to a real h264 or VP9 file."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np

from examples.tabletop.scene import CELLS, COLOURS, LEVELS, Scene

PIXELS = 56
"""Frame edge: four 14-pixel patches, one per cell."""
CODECS = {
    ".mp4": ("libx264", {"preset": "veryfast", "crf": "22"}),
    ".webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "lag-in-frames": "0"}),
}


def background(scene: Scene) -> np.ndarray:
    """The table [H, W, 3] float: a colour gradient that tells absolute position, texture, and the box."""
    cell = PIXELS // CELLS
    ramp = 50 + 110 * np.arange(PIXELS, dtype=np.float32) / PIXELS
    table_HW3 = np.full((PIXELS, PIXELS, 3), 90, np.float32)
    table_HW3[..., 0], table_HW3[..., 1] = ramp[None, :], ramp[:, None]
    noise = LEVELS[scene.level].noise
    if noise:
        table_HW3 += np.random.default_rng(scene.texture_seed).normal(0, noise, table_HW3.shape)
    x, y = scene.box[0] * cell, scene.box[1] * cell
    table_HW3[y : y + cell, x : x + cell] = 250
    table_HW3[y + 2 : y + cell - 2, x + 2 : x + cell - 2] = 10
    return table_HW3


def _fill(frame_HW3: np.ndarray, x: int, y: int, half_width: int, half_height: int, colour: object) -> None:
    frame_HW3[max(y - half_height, 0) : y + half_height, max(x - half_width, 0) : x + half_width] = colour


def render(scene: Scene, fps: float) -> np.ndarray:
    """All frames uint8 [T, H, W, 3] at a frame rate; the frame at index i shows the time (i + 1) / fps."""
    cell, light = PIXELS // CELLS, LEVELS[scene.level].light
    count = round(scene.seconds * fps)
    frames_THW3 = np.empty((count, PIXELS, PIXELS, 3), np.uint8)
    frames_THW3[:] = np.clip(background(scene) * light, 0, 255)
    colours = [tuple(int(channel * light) for channel in COLOURS[name]) for name in scene.colours]
    white = int(255 * light)
    for t in range(count):
        time = (t + 1) / fps
        for k, (x, y) in enumerate(np.rint(scene.blocks_at(time) * cell).astype(int)):
            in_box = (x // cell, y // cell) == scene.box
            _fill(frames_THW3[t], x, y, 4 if in_box else 5, 4 if in_box else 5, colours[k])
        x, y = np.rint(scene.gripper_at(time) * cell).astype(int)
        _fill(frames_THW3[t], x, y, 4, 1, white)
        _fill(frames_THW3[t], x, y, 1, 4, white)
    return frames_THW3


def write_video(path: Path, frames_THW3: np.ndarray, fps: int) -> None:
    """Encode into the codec that the file's ending names; the file appears whole or not at all."""
    codec, options = CODECS[path.suffix]
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with av.open(str(unfinished), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames_THW3.shape[2], frames_THW3.shape[1], "yuv420p"
        stream.options = options
        stream.codec_context.thread_count = 1
        for frame_HW3 in frames_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HW3, format="rgb24")))
        container.mux(stream.encode())
    unfinished.replace(path)
