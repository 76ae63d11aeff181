"""Decoding with NVIDIA DALI's imperative mode: NVDEC on a GPU, VP8, VP9 and MJPEG on a CPU.

Only the decoding is DALI's. Frames are turned and resized by torch on the device they came out on, with the same
arithmetic as everywhere, so that a clip's patches don't depend on who decoded it.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from dppo_mcore.data import errors
from dppo_mcore.data.decode_pyav import upright
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.patches import resize
from dppo_mcore.data.probe import probe

# Decoded frames that exist at once, and frames resized at once (in fp32 on a GPU).
FRAME_BYTES = 512 << 20
RESIZED_AT_ONCE = 8
# DALI's reader of clips in memory counts bytes in 32 bits.
LARGEST_FILE = (1 << 31) - 1


class DaliDecoder:
    """`device` cuda decodes with NVDEC there (DALI's "mixed" operator, which imperative mode calls "gpu")."""

    name = "dali"

    def __init__(self, device: torch.device) -> None:
        import nvidia.dali.experimental.dynamic as ndd

        self._ndd = ndd
        self._device_id = (device.index or 0) if device.type == "cuda" else None
        self._place = "cpu" if self._device_id is None else f"gpu:{self._device_id}"

    def decode(self, path: str, indices: tuple[int, ...], size: tuple[int, int], rotation: int = 0) -> Tensor:
        """Frames by number in presentation order (repeats allowed), turned and resized: uint8 [T, 3, h, w]."""
        info = probe(path)
        # DALI fills up with black for a frame it doesn't have, and counts packets that nobody is shown.
        if not info.countable or max(indices) >= len(info.times):
            raise MediaError(path, errors.FRAME_COUNT, "DALI would count other frames than the plan")
        if os.path.getsize(path) > LARGEST_FILE:
            raise MediaError(path, errors.UNREADABLE, "DALI reads clips of less than 2 GiB")
        encoded = np.fromfile(path, np.uint8)
        step = max(FRAME_BYTES // (info.height * info.width * 3), 1)
        parts = [indices[at : at + step] for at in range(0, len(indices), step)]
        try:
            return torch.cat([resized for part in parts for resized in self._resized(encoded, part, size, rotation)])
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise MediaError(path, errors.BAD_FRAMES, f"DALI: {reason[-1].strip()[:160]}") from error

    def _resized(
        self, encoded: np.ndarray, indices: tuple[int, ...], size: tuple[int, int], rotation: int
    ) -> list[Tensor]:
        frames_TCHW = upright(self._frames(encoded, indices).permute(0, 3, 1, 2), rotation)
        return [resize(some_TCHW, size).contiguous().cpu() for some_TCHW in frames_TCHW.split(RESIZED_AT_ONCE)]

    def _frames(self, encoded: np.ndarray, indices: tuple[int, ...]) -> Tensor:
        with self._ndd.EvalContext(device_id=self._device_id):
            # Left to itself, the operator of every decoding process pins its thread to the same core.
            decoded = self._ndd.decoders.video(encoded, device=self._place, frames=list(indices), affine=False)
            return torch.from_dlpack(decoded)
