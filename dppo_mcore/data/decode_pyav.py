"""Decoding on any CPU with PyAV (FFmpeg)."""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

from dppo_mcore.data import errors
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.patches import resize
from dppo_mcore.data.probe import ClipInfo, opened, probe, video_stream

# The conversion that DALI compiles in: with it the two backends agree bit for bit.
CONVERSION = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

# Their decoders drop the unreferenced picture they are given, and only that one; dav1d, for one, looks later.
SKIPS_PER_PACKET = ("h264", "hevc", "mpeg4")


class PyAvDecoder:
    """One call, one clip; keeps nothing open."""

    name = "pyav"

    def decode(self, path: str, indices: tuple[int, ...], size: tuple[int, int], rotation: int = 0) -> Tensor:
        """Frames by number in presentation order (repeats allowed), turned and resized: uint8 [T, 3, h, w]."""
        info = probe(path)
        positions: dict[int, list[int]] = {}
        for position, index in enumerate(indices):
            if index >= len(info.times):
                raise MediaError(path, errors.FRAME_COUNT, f"frame {index} of {len(info.times)} was asked for")
            positions.setdefault(index, []).append(position)
        frames_TCHW = torch.empty((len(indices), 3, *size), dtype=torch.uint8)
        reformatter = VideoReformatter()
        try:
            for index, frame in _wanted_frames(path, info, positions):
                rgb = reformatter.reformat(frame, format="rgb24", interpolation=CONVERSION, threads=1)
                frame_CHW = upright(torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1), rotation)
                frames_TCHW[positions.pop(index)] = resize(frame_CHW[None], size)
        except (av.FFmpegError, OSError) as error:
            raise MediaError(path, errors.BAD_FRAMES, str(error).splitlines()[0]) from error
        if positions:
            raise MediaError(path, errors.FRAME_COUNT, f"{len(positions)} frames never came, first {min(positions)}")
        return frames_TCHW


def upright(frames_CHW: Tensor, rotation: int) -> Tensor:
    """Turn [..., h, w] clockwise by a multiple of 90 degrees."""
    return torch.rot90(frames_CHW, -rotation // 90, dims=(-2, -1)) if rotation else frames_CHW


def _wanted_frames(path: str, info: ClipInfo, wanted: dict[int, list[int]]) -> Iterator[tuple[int, av.VideoFrame]]:
    """The wanted frames as they are decoded. Pictures that no wanted frame can need are not decoded."""
    left = len(wanted)
    with opened(path) as container:
        stream = video_stream(path, container)
        codec = stream.codec_context
        codec.thread_count = 1
        numbers = None if info.pts is None else {int(pts): index for index, pts in enumerate(info.pts)}
        skipped = _idle_keyframes(info, wanted)
        count, skipping = 0, False
        for packet in container.demux(stream):
            if numbers is not None and packet.pts is not None:
                index = numbers.get(packet.pts)
                if index is not None and info.keyframes[index]:
                    skipping = index in skipped
                if skipping:
                    continue
                if info.codec in SKIPS_PER_PACKET:
                    codec.skip_frame = "DEFAULT" if index in wanted else "NONREF"
            for frame in packet.decode():
                number = count if numbers is None else numbers.get(frame.pts)
                count += 1
                if frame.is_corrupt:
                    raise MediaError(path, errors.BAD_FRAMES, f"the decoder reports damage at frame {number}")
                if number in wanted:
                    yield number, frame
                    left -= 1
                    if not left:
                        return


def _idle_keyframes(info: ClipInfo, wanted: dict[int, list[int]]) -> set[int]:
    """Key frames whose whole group of pictures holds nothing wanted."""
    if not info.closed:
        return set()
    keys = np.flatnonzero(info.keyframes)
    groups = np.searchsorted(keys, np.fromiter(wanted, np.int64), side="right") - 1
    return set(np.delete(keys, np.unique(groups[groups >= 0])).tolist())
