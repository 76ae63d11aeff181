"""Samples that cannot be used, each written down once with its reason, and tried again once its files have changed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dppo_mcore.data import errors
from dppo_mcore.data.errors import DataError, LengthError, MediaError
from dppo_mcore.types import Media, Sample


@dataclass(frozen=True, slots=True)
class Damage:
    """One entry of the quarantine."""

    sample_id: str
    path: str
    """The medium at fault; empty where it is the sample itself."""
    reason: str
    detail: str
    use: str = ""
    """The requests that it is too long for (`messages.use_of`); empty where it holds for all."""

    def __str__(self) -> str:
        return ": ".join(filter(None, (f"sample {self.sample_id!r}", self.path, self.reason, self.use, self.detail)))


class Quarantine:
    """Kept in memory, and in a JSONL file where one is given (read again when the run goes on).

    An entry holds for the media a sample had then, where they lay. When the file is read again, it holds as long as
    size and time of change of each are what they were: so a clip that has come, or was mended, is tried again. A
    refusal for length holds for its use only: what is too long to be learnt may be practised, or seen at a shorter
    horizon.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        self._file = Path(file) if file else None
        self._entries: dict[tuple[str, frozenset[str] | None, str], Damage] = {}
        self.counts: Counter[str] = Counter()
        if self._file and self._file.is_file():
            for line in self._file.read_text().splitlines():
                try:
                    row = json.loads(line)
                    files = row.pop("files", None)
                    entry = Damage(**row)
                except (json.JSONDecodeError, TypeError, AttributeError):
                    continue  # the half line of a killed process; its sample is noted again when it comes up
                if files is None or files == _states(files):
                    self._keep(entry, files)

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, sample: Sample, use: str = "") -> Damage | None:
        """What is wrong with a sample as it is now, for a use; None where nothing is known."""
        if not self._entries:
            return None
        files = frozenset(media.path for media in sample.media)
        keys = ((sample.id, place, what) for what in dict.fromkeys(("", use)) for place in (None, files))
        return next((entry for key in keys if (entry := self._entries.get(key))), None)

    def keep_for(self, samples: Callable[[str], Iterable[Sample]]) -> None:
        """Forget entries that hold for none of the samples of their id: their media lie elsewhere now."""
        for key, entry in list(self._entries.items()):
            if not any(self.of(sample, entry.use) is entry for sample in samples(entry.sample_id)):
                del self._entries[key]
                self.counts -= Counter([entry.reason])

    def entries(self) -> tuple[Damage, ...]:
        """Everything so far, in order."""
        return tuple(self._entries.values())

    def add(self, sample_id: str, error: DataError, media: Sequence[Media] | None = None, use: str = "") -> bool:
        """Note a sample; False where it was noted before. Without `media` it holds whatever becomes of its files.

        `use` is what it was asked for, and matters where it is too long for that.
        """
        files = None if media is None else _states(item.path for item in media)
        if isinstance(error, MediaError):
            entry = Damage(sample_id, error.path, error.reason, error.detail)
        elif isinstance(error, LengthError):
            entry = Damage(sample_id, "", errors.TOO_LONG, str(error), use)
        else:
            entry = Damage(sample_id, "", errors.UNUSABLE, str(error))
        if not self._keep(entry, files):
            return False
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            row = asdict(entry) if files is None else {**asdict(entry), "files": files}
            with open(self._file, "a") as file:
                file.write(json.dumps(row) + "\n")
        return True

    def _keep(self, entry: Damage, files: Mapping[str, str] | None) -> bool:
        key = (entry.sample_id, None if files is None else frozenset(files), entry.use)
        if key in self._entries:
            return False
        self._entries[key] = entry
        self.counts[entry.reason] += 1
        return True


def _states(paths: Iterable[str]) -> dict[str, str]:
    """Size and time of change of each file; empty where there is none."""
    states = {}
    for path in paths:
        try:
            stat = os.stat(path)
        except (OSError, ValueError):
            states[path] = ""
        else:
            states[path] = f"{stat.st_size} {stat.st_mtime_ns}"
    return states
