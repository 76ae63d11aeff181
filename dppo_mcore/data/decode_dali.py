"""Decoding with NVIDIA DALI's imperative mode: NVDEC on a GPU, VP8, VP9 and MJPEG on a CPU.

Only the decoding is DALI's. Frames are turned and resized by torch on the device they came out on, with the same
arithmetic as everywhere, so that a clip's patches don't depend on who decoded it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dppo_mcore.data import errors
from dppo_mcore.data.decode_pyav import upright
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.patches import resize


class DaliDecoder:
    """`device` cuda decodes with NVDEC there ("mixed"), cpu on the CPU."""

    name = "dali"

    def __init__(self, device: torch.device) -> None:
        import nvidia.dali.experimental.dynamic as ndd

        self._ndd = ndd
        self._device = device
        self._place = "mixed" if device.type == "cuda" else "cpu"

    def decode(self, path: str, indices: tuple[int, ...], size: tuple[int, int], rotation: int = 0) -> Tensor:
        """Frames by number in presentation order (repeats allowed), turned and resized: uint8 [T, 3, h, w]."""
        try:
            encoded = np.fromfile(path, np.uint8)
        except OSError as error:
            raise MediaError(path, errors.MISSING, error.strerror or "") from error
        if not encoded.size:
            raise MediaError(path, errors.EMPTY)
        try:
            frames_THWC = self._frames(encoded, indices)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise MediaError(path, errors.BAD_FRAMES, f"DALI: {reason[-1].strip()[:160]}") from error
        if len(frames_THWC) != len(indices):
            raise MediaError(path, errors.FRAME_COUNT, f"DALI gave {len(frames_THWC)} of {len(indices)} frames")
        return resize(upright(frames_THWC.permute(0, 3, 1, 2), rotation), size).contiguous().cpu()

    def _frames(self, encoded: np.ndarray, indices: tuple[int, ...]) -> Tensor:
        device_id = self._device.index if self._device.type == "cuda" else None
        with self._ndd.EvalContext(device_id=device_id):
            decoded = self._ndd.decoders.video(encoded, device=self._place, frames=list(indices))
            return torch.from_dlpack(decoded)
