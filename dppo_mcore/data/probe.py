"""What a clip's container says, without decoding: frame times, size, rotation."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import av
import numpy as np

from dppo_mcore.data import errors
from dppo_mcore.data.errors import MediaError

av.logging.set_level(av.logging.PANIC)

# What only says where the pictures are, which may be anywhere.
LISTS = {"avisynth", "concat", "dash", "hls", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "vapoursynth",
         "webm_dash_manifest"}  # fmt: skip
OPTIONS = {"format_whitelist": ",".join(sorted(av.formats_available - LISTS)), "protocol_whitelist": "file"}
# Pillow knows many more images, some of which are programs: EPS is run by Ghostscript. MPO is opened as a JPEG.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
IMAGE_FORMATS = ("image2", "_pipe")
# In h264: the type of a unit of a picture that nothing after it refers beyond, and what marks units in a byte stream.
IDR, START_CODE = 5, b"\0\0\1"
# A plan is followed by its decoding, seldom by another look; an hour's clip takes 2 MB.
CLIPS_KEPT = 64


@dataclass(frozen=True)
class ClipInfo:
    """A clip's frames in presentation order."""

    path: str
    times: np.ndarray
    """float64 [N], seconds from the first frame."""
    pts: np.ndarray | None
    """int64 [N] in stream units; None where the container has none or repeats them: frames are then counted."""
    keyframes: np.ndarray
    """bool [N]: those that decoding can start at as if nothing came before."""
    closed: bool
    """No frame decoded after a key frame is shown before it: groups of pictures can be skipped whole."""
    duration: float
    """Seconds from the first frame's start to the last one's end."""
    width: int
    height: int
    """Coded size, before rotation."""
    rotation: int
    """Degrees clockwise to turn a decoded frame upright: 0, 90, 180 or 270."""
    codec: str
    countable: bool
    """Every reader counts the same frames: one stream, and one shown frame per packet, none before time zero."""


def probe(path: str) -> ClipInfo:
    """Demux a clip once (cached by path, size and time of change). Raises `MediaError` for an unusable clip."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError) as error:
        raise MediaError(path, errors.MISSING, _short(error)) from error
    if stat.st_size == 0:
        raise MediaError(path, errors.EMPTY)
    return _probe(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=CLIPS_KEPT)
def _probe(path: str, size: int, changed: int) -> ClipInfo:
    try:
        with opened(path) as container:
            return _demux(path, container)
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(path, errors.UNREADABLE, _short(error)) from error


def opened(path: str) -> Any:
    """The container of a clip; a list of clips, such as HLS's, is refused, whatever its name is."""
    return av.open(path, metadata_errors="ignore", options=OPTIONS)


def _short(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def video_stream(path: str, container: Any) -> Any:
    """The stream to decode: the first that is not a cover picture."""
    pictures = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise MediaError(path, errors.NO_VIDEO)
    return streams[0]


def _demux(path: str, container: Any) -> ClipInfo:
    if any(name in container.format.name for name in IMAGE_FORMATS):
        raise MediaError(path, errors.WRONG_KIND, f"an image ({container.format.name}) given as a video")
    stream = video_stream(path, container)
    codec = stream.codec_context
    if container.format.name == "avi" and _avi_has_no_rate(path):
        raise MediaError(path, errors.NO_RATE, "the header says 0 frames per second")
    if codec is None or not codec.width or not codec.height:
        raise MediaError(path, errors.UNREADABLE, "the header has no codec or frame size")
    rows: list[tuple[int | None, int | None, bool, int]] = []
    unseen = 0
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard or _is_hidden(codec.name, packet):
            unseen += packet.dts is not None
            continue
        if packet.is_corrupt:
            raise MediaError(path, errors.TRUNCATED, f"packet {len(rows)} is incomplete")
        rows.append((packet.pts, packet.dts, packet.is_keyframe and _is_entry(codec, packet), packet.duration or 0))
    if not rows:
        raise MediaError(path, errors.FRAME_COUNT, "the container holds no frame")
    alone = unseen == 0 and len(container.streams.video) == 1
    info = _timeline(path, stream, rows, _rotation(path, container, stream), alone)
    _check_complete(path, stream, info, min((row[0] for row in rows if row[0] is not None), default=0))
    return info


def _is_hidden(codec: str, packet: Any) -> bool:
    """VP8 stores frames that are never shown as packets of their own; its header's fifth bit tells."""
    return codec in ("vp8", "libvpx") and not memoryview(packet)[0] >> 4 & 1


def _is_entry(codec: Any, packet: Any) -> bool:
    """FFmpeg also calls an h264 picture key from which on the picture only recovers bit by bit (intra refresh)."""
    if codec.name != "h264":
        return True
    header = codec.extradata or b""
    return IDR in _nal_types(bytes(packet), (header[4] & 3) + 1 if len(header) > 4 and header[0] == 1 else None)


def _nal_types(content: bytes, length_bytes: int | None) -> Iterator[int]:
    """Types of an h264 packet's units, which follow their length (MP4, Matroska) or a start code (`None`)."""
    at = 0
    while length_bytes is not None and at + length_bytes < len(content):
        start = at + length_bytes
        yield content[start] & 31
        at = start + int.from_bytes(content[at:start])
    while length_bytes is None and 0 <= (at := content.find(START_CODE, at)) < len(content) - len(START_CODE):
        at += len(START_CODE)
        yield content[at] & 31


def _timeline(path: str, stream: Any, rows: list[tuple[Any, Any, bool, int]], rotation: int, alone: bool) -> ClipInfo:
    has_pts = all(row[0] is not None for row in rows)
    ticks = [row[0] if has_pts else row[1] for row in rows]
    if any(tick is None for tick in ticks):
        if not stream.average_rate:
            raise MediaError(path, errors.NO_RATE, "no timestamps and no frame rate")
        per_frame = 1 / (stream.average_rate * stream.time_base)
        ticks = [round(index * per_frame) for index in range(len(rows))]
    order = np.argsort(np.array(ticks, np.int64), kind="stable")
    pts = np.array(ticks, np.int64)[order]
    steps = np.diff(pts)
    if len(rows) > 1 and (steps.sum() == 0 or (not stream.average_rate and not steps.all())):
        raise MediaError(path, errors.NO_RATE, f"{int((steps == 0).sum()) + 1} of {len(rows)} frames share their time")
    unit = float(stream.time_base)
    usual = (
        float(np.median(steps[steps > 0]))
        if len(rows) > 1
        else 1 / float((stream.average_rate or 1) * stream.time_base)
    )
    last = rows[int(order[-1])][3]
    times = (pts - pts[0]) * unit
    return ClipInfo(
        path=path,
        times=times,
        pts=pts if has_pts and steps.all() else None,
        keyframes=np.array([row[2] for row in rows])[order],
        closed=has_pts and bool(steps.all()) and _is_closed(ticks, [row[2] for row in rows]),
        duration=float(times[-1]) + (last if 0 < last < 100 * usual else usual) * unit,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        rotation=rotation,
        codec=stream.codec_context.name,
        countable=alone and has_pts and bool(steps.all()) and int(pts[0]) >= 0,
    )


def _avi_has_no_rate(path: str) -> bool:
    """FFmpeg takes such a clip for 25 frames per second, which is as wrong as any other guess."""
    with open(path, "rb") as file:
        head = file.read(8192)
    at = head.find(b"strh")
    while at >= 0 and head[at + 8 : at + 12] != b"vids":
        at = head.find(b"strh", at + 4)
    return 0 <= at <= len(head) - 36 and struct.unpack_from("<I", head, at + 32)[0] == 0


def _is_closed(ticks: list[Any], keys: list[bool]) -> bool:
    latest_key = ticks[0]
    for tick, key in zip(ticks, keys, strict=True):
        if key:
            latest_key = tick
        elif tick < latest_key:
            return False
    return keys[0]


def _check_complete(path: str, stream: Any, info: ClipInfo, first_pts: int) -> None:
    """A header that promises clearly more than what was found means that the file's end is missing."""
    whole = float((stream.duration or 0) * stream.time_base)
    count = len(info.times)
    # Headers also count frames that an edit list cuts off or an AVI leaves out: no loss where the time is all there.
    if stream.frames > count * 1.02 + 2 and (not whole or info.duration < 0.98 * whole):
        raise MediaError(path, errors.TRUNCATED, f"the header says {stream.frames} frames, {count} are there")
    # Matroska's tag is the time at which the stream ends, however late it began.
    promised = _promised_seconds(stream) - max(first_pts, 0) * float(stream.time_base)
    if promised > info.duration * 1.05 + 0.5:
        raise MediaError(path, errors.TRUNCATED, f"the header says {promised:.2f} s, {info.duration:.2f} s are there")


def _promised_seconds(stream: Any) -> float:
    clock = stream.metadata.get("DURATION", "")
    try:
        hours, minutes, seconds = clock.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _rotation(path: str, container: Any, stream: Any) -> int:
    """MP4 and MOV say it in the track header; of other containers the first frame is asked."""
    if "mp4" in container.format.name:
        with open(path, "rb") as file:
            return _track_rotation(file, os.path.getsize(path), stream.id)
    if "matroska" not in container.format.name:
        return 0
    with opened(path) as again:
        try:
            frame = next(again.decode(video_stream(path, again)))
        except (av.FFmpegError, StopIteration) as error:
            raise MediaError(path, errors.BAD_FRAMES, _short(error)) from error
        return -round(frame.rotation / 90) * 90 % 360


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, start of its content, end) of the MP4 boxes between two offsets."""
    while start + 8 <= end:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = struct.unpack(">Q", file.read(8))[0], 16
        size = size or end - start
        if size < header:
            return
        yield name, start + header, min(start + size, end)
        start += size


def _track_rotation(file: BinaryIO, size: int, track: int) -> int:
    for name, start, end in _boxes(file, 0, size):
        if name != b"moov":
            continue
        for inner, at, until in _boxes(file, start, end):
            if inner != b"trak":
                continue
            for deep, begin, _ in _boxes(file, at, until):
                if deep == b"tkhd":
                    file.seek(begin)
                    content = file.read(96)
                    wide = 12 if content[0] == 1 else 0
                    number = struct.unpack_from(">I", content, 20 if wide else 12)[0]
                    if number == track:
                        a, b = struct.unpack_from(">ii", content, 40 + wide)
                        return {(0, 1): 90, (-1, 0): 180, (0, -1): 270}.get((_sign(a), _sign(b)), 0)
    return 0


def _sign(value: int) -> int:
    return (value > 1 << 12) - (value < -(1 << 12))
