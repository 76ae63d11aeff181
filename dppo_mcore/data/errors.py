"""What can be wrong with data: a row of a manifest, or a medium it names."""

from __future__ import annotations


class DataError(ValueError):
    """A row, a sample or a prompt that cannot be used; the message is one line and says what to do."""


class MediaError(DataError):
    """A clip or image that cannot be used. `reason` is one of a few fixed words, for counting; `detail` is free."""

    def __init__(self, path: str, reason: str, detail: str = "") -> None:
        super().__init__(path, reason, detail)
        self.path = path
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class LengthError(DataError):
    """A prompt or conversation that is too long for what it was asked for; the sample may serve for something else."""


MISSING = "missing file"
OUTSIDE = "outside the media root"
EMPTY = "zero bytes"
UNREADABLE = "not a media file"
NO_VIDEO = "no video stream"
WRONG_KIND = "wrong kind of file"
TRUNCATED = "truncated"
NO_RATE = "no frame rate"
BAD_FRAMES = "frames do not decode"
FRAME_COUNT = "wrong frame count"
WINDOW = "empty clip window"
SHAPE = "unusable frame size"
CRASH = "decoder crashed"
TOO_LONG = "too long"
UNUSABLE = "unusable sample"
