"""Images by Pillow: their size as planned, their pixels as uint8 RGB."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dppo_mcore.data import errors
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.probe import PICTURES

ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)


def image_size(path: str) -> tuple[int, int]:
    """Height and width, upright as the EXIF says. Raises `MediaError` for an unusable image."""
    if not os.path.exists(path):
        raise MediaError(path, errors.MISSING)
    with _opened(path, errors.UNREADABLE) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(ORIENTATION) in TURNED else (height, width)


def read_image(path: str) -> Tensor:
    """The first picture of a file, upright, as uint8 [1, 3, h, w]."""
    with _opened(path, errors.BAD_FRAMES) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F"):
            raise MediaError(
                path, errors.BAD_FRAMES, f"mode {upright.mode} has no known range; save it with 8 or 16 bits"
            )
        if upright.mode.startswith("I;16"):
            # Pillow's own conversion cuts all that is above 255 off, which turns depth maps white.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        rgb_HWC = np.array(upright.convert("RGB"))
    return torch.from_numpy(rgb_HWC).permute(2, 0, 1)[None]


@contextmanager
def _opened(path: str, reason: str) -> Iterator[Image.Image]:
    try:
        if os.path.getsize(path) == 0:
            raise MediaError(path, errors.EMPTY)
        with Image.open(path, formats=PICTURES) as image:
            yield image
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(path, errors.WRONG_KIND, "not an image") from error
    except Exception as error:  # whatever a damaged header leads Pillow's readers into
        raise MediaError(path, reason, str(error) or type(error).__name__) from error
