"""Frames to the vision tower's patches, with Hugging Face's arithmetic and without torchvision.

Shape suffixes: T frames, C channels, P patches, V values of a patch (channels x 2 frames x 14 x 14).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200


@dataclass(frozen=True, slots=True)
class Geometry:
    """How frames are cut, from a checkpoint's `preprocessor_config.json`."""

    patch: int = 14
    temporal: int = 2
    merge: int = 2
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @property
    def factor(self) -> int:
        """Height and width are multiples of this."""
        return self.patch * self.merge


def load_geometry(model_dir: str | Path) -> Geometry:
    """Geometry of a Hugging Face directory; the released values where it says nothing."""
    path = Path(model_dir) / "preprocessor_config.json"
    raw = json.loads(path.read_text()) if path.is_file() else {}
    return Geometry(
        patch=raw.get("patch_size", 14),
        temporal=raw.get("temporal_patch_size", 2),
        merge=raw.get("merge_size", 2),
        mean=tuple(raw.get("image_mean", MEAN)),
        std=tuple(raw.get("image_std", STD)),
    )


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Nearest size with both sides multiples of `factor`, area within the bounds and the aspect about kept."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{width}x{height} is more than {MAX_ASPECT} times longer than wide")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor * factor > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor * factor < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def resize(frames_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 frames to `size`, bicubic with antialias. Off the CPU the arithmetic is fp32, clamped and rounded."""
    if frames_TCHW.shape[-2:] == size:
        return frames_TCHW
    if frames_TCHW.device.type == "cpu":
        return F.interpolate(frames_TCHW, size, mode="bicubic", align_corners=False, antialias=True)
    resized = F.interpolate(frames_TCHW.float(), size, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp_(0, 255).round_().to(torch.uint8)


def patchify(frames_TCHW: Tensor, geometry: Geometry) -> Tensor:
    """Frames at their final size to [P, V], same dtype; the last frame is repeated to fill a temporal patch.

    Patches of one merged token are neighbours; within a patch: channel, frame, row, column.
    """
    short = -frames_TCHW.shape[0] % geometry.temporal
    if short:
        frames_TCHW = torch.cat([frames_TCHW, frames_TCHW[-1:].expand(short, -1, -1, -1)])
    frames, channels, height, width = frames_TCHW.shape
    patch, merge, temporal = geometry.patch, geometry.merge, geometry.temporal
    blocks = frames_TCHW.reshape(
        frames // temporal,
        temporal,
        channels,
        height // patch // merge,
        merge,
        patch,
        width // patch // merge,
        merge,
        patch,
    )
    ordered = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(-1, channels * temporal * patch * patch)


def normalise(patches_PV: Tensor, geometry: Geometry) -> Tensor:
    """uint8 patches to float32 with the checkpoint's mean and deviation, in the order of operations of HF's."""
    channels = len(geometry.mean)
    scale = 1.0 / (1.0 / 255)
    mean_C = torch.tensor(geometry.mean, device=patches_PV.device) * scale
    std_C = torch.tensor(geometry.std, device=patches_PV.device) * scale
    values_PCX = patches_PV.reshape(len(patches_PV), channels, -1).to(torch.float32)
    values_PCX.sub_(mean_C.view(1, -1, 1)).div_(std_C.view(1, -1, 1))
    return values_PCX.reshape(len(patches_PV), -1)
