"""Samples that cannot be used, each written down once with its reason."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from dppo_mcore.data import errors
from dppo_mcore.data.errors import DataError, MediaError


@dataclass(frozen=True, slots=True)
class Damage:
    """One entry of the quarantine."""

    sample_id: str
    path: str
    """The medium at fault; empty where it is the sample itself."""
    reason: str
    detail: str


class Quarantine:
    """Kept in memory, and in a JSONL file where one is given (read again when the run goes on)."""

    def __init__(self, file: str | Path | None = None) -> None:
        self._file = Path(file) if file else None
        self._entries: dict[str, Damage] = {}
        self.counts: Counter[str] = Counter()
        if self._file and self._file.is_file():
            for line in self._file.read_text().splitlines():
                try:
                    entry = Damage(**json.loads(line))
                except (json.JSONDecodeError, TypeError):
                    continue  # the half line of a killed process; its sample is noted again when it comes up
                self._keep(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._entries

    def entries(self) -> tuple[Damage, ...]:
        """Everything so far, in order."""
        return tuple(self._entries.values())

    def add(self, sample_id: str, error: DataError) -> bool:
        """Note a sample; False where it was noted before."""
        if sample_id in self._entries:
            return False
        if isinstance(error, MediaError):
            entry = Damage(sample_id, error.path, error.reason, error.detail)
        else:
            entry = Damage(sample_id, "", errors.UNUSABLE, str(error))
        self._keep(entry)
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        return True

    def _keep(self, entry: Damage) -> None:
        if entry.sample_id not in self._entries:
            self._entries[entry.sample_id] = entry
            self.counts[entry.reason] += 1
