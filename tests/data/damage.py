"""Eight ways in which a clip of a pool can be unusable."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

from dppo_mcore.data import errors
from tests.data.clips import write_audio


def truncated(good: Path, bad: Path) -> None:
    """The last third is missing, header and index are there (streaming layout)."""
    content = good.read_bytes()
    bad.write_bytes(content[: len(content) * 2 // 3])


def zero_bytes(good: Path, bad: Path) -> None:
    """An empty file."""
    bad.write_bytes(b"")


def audio_only(good: Path, bad: Path) -> None:
    """Sound without picture."""
    write_audio(bad)


def wrong_extension(good: Path, bad: Path) -> None:
    """A text file that calls itself a clip."""
    bad.write_text("This is no film. " * 40)


def bit_flips(good: Path, bad: Path) -> None:
    """Flipped bits in the pictures, which h264's decoder notices."""
    content = bytearray(good.read_bytes())
    start = content.find(b"mdat") + 40
    stop = content.find(b"moov", start)
    chance = random.Random(bad.name)
    for _ in range(12):
        content[chance.randrange(start, stop if stop > 0 else len(content) - 40)] ^= 1 << chance.randrange(8)
    bad.write_bytes(content)


def missing(good: Path, bad: Path) -> None:
    """No file."""


def no_rate(good: Path, bad: Path) -> None:
    """Every frame lasts zero seconds."""
    content = bytearray(good.read_bytes())
    at = content.find(b"stts")
    for entry in range(struct.unpack_from(">I", content, at + 8)[0]):
        struct.pack_into(">I", content, at + 16 + 8 * entry, 0)
    bad.write_bytes(content)


# "outside" is made in the manifest: its path leaves the root.
WAYS: dict[str, tuple[Callable[[Path, Path], None], set[str]]] = {
    "truncated": (truncated, {errors.TRUNCATED, errors.UNREADABLE}),
    "zero bytes": (zero_bytes, {errors.EMPTY}),
    "audio only": (audio_only, {errors.NO_VIDEO}),
    "wrong extension": (wrong_extension, {errors.UNREADABLE}),
    "bit flips": (bit_flips, {errors.BAD_FRAMES, errors.FRAME_COUNT}),
    "missing": (missing, {errors.MISSING}),
    "0 fps": (no_rate, {errors.NO_RATE}),
}
