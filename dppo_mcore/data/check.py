"""What a manifest holds and what is wrong with it, before a run is started on it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch

from dppo_mcore.config import DataConfig, PracticeConfig
from dppo_mcore.data import errors
from dppo_mcore.data.chat import MEDIA_TOKENS
from dppo_mcore.data.decode import make_decoder
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.frames import plan_key, plan_media
from dppo_mcore.data.manifest import Manifest
from dppo_mcore.data.patches import Geometry
from dppo_mcore.data.probe import probe
from dppo_mcore.data.quarantine import Damage
from dppo_mcore.rewards.registry import without_scorer
from dppo_mcore.types import Media, Sample

Depth = Literal["rows", "probe", "decode"]
DURATION_EDGES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
FINGERPRINT_BYTES = 1 << 16
GEOMETRY = Geometry()


@dataclass(frozen=True, slots=True)
class Leak:
    """A sample of the pool that an evaluation manifest holds too."""

    sample_id: str
    file: str
    other_id: str
    why: Literal["same media and question", "same media"]


@dataclass
class Report:
    """Findings about one manifest."""

    file: str
    rows: int
    refused: list[Damage] = field(default_factory=list)
    """Rows not taken: `sample_id` is file:line."""
    damaged: list[Damage] = field(default_factory=list)
    """Rows whose media or text cannot be used, each row once."""
    objectives: dict[str, int] = field(default_factory=dict)
    dimensions: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    media: dict[str, int] = field(default_factory=dict)
    durations: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    """Seconds of all different clips together."""
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """(sample, earlier sample) with the same media and the same question."""
    leaks: list[Leak] = field(default_factory=list)
    scorers: str = ""
    """What is wrong with objectives that have no scorer."""

    def ok(self) -> bool:
        """Nothing refused, damaged, leaked or without a scorer."""
        leaked = any(leak.why != "same media" for leak in self.leaks)
        return not (self.refused or self.damaged or leaked or self.scorers)


def check_manifest(
    manifest: Manifest,
    evaluations: Sequence[Manifest] = (),
    depth: Depth = "probe",
    data: DataConfig | None = None,
    workers: int = 2,
    scored: bool = True,
    horizons: Sequence[float] = PracticeConfig.horizons,
    geometry: Geometry = GEOMETRY,
) -> Report:
    """`rows` reads the manifest only, `probe` opens every medium, `decode` also decodes the frames a run would see.

    Those are the ones of every horizon, at the sizes of the checkpoint that `geometry` is of. What is `scored`, and not
    only learnt, needs objectives that have a scorer by now.
    """
    report = Report(str(manifest.path), len(manifest))
    report.objectives, report.dimensions = manifest.counts("objective"), manifest.counts("dimension")
    report.sources = manifest.counts("source")
    report.scorers = without_scorer(report.objectives) if scored else ""
    for row in manifest.refused:
        reason = errors.OUTSIDE if row.media else "refused row"
        report.refused.append(Damage(f"{row.file}:{row.line}", row.media, reason, row.reason))
    if depth != "rows":
        _check_media(report, manifest, depth, data or DataConfig(), workers, horizons, geometry)
    _check_overlaps(report, manifest, evaluations)
    return report


def _check_media(
    report: Report,
    manifest: Manifest,
    depth: Depth,
    data: DataConfig,
    workers: int,
    horizons: Sequence[float],
    geometry: Geometry,
) -> None:
    decoder = make_decoder(data.decoder, torch.device("cpu"))
    found: dict[Media, MediaError | float] = {}
    clips: dict[str, float] = {}

    def look(media: Media) -> MediaError | float:
        try:
            plans = [plan_media(media, data, horizon, geometry) for horizon in dict.fromkeys(horizons)]
            for plan in {plan_key(plan): plan for plan in plans}.values() if depth == "decode" else ():
                decoder(plan)
            return probe(media.path).duration if media.kind == "video" else 0.0
        except MediaError as error:
            return error

    with ThreadPoolExecutor(workers) as threads:
        for samples in _chunks(manifest, 256):
            new = list(dict.fromkeys(media for sample in samples for media in sample.media if media not in found))
            found.update(zip(new, threads.map(look, new), strict=True))
            for sample in samples:
                if token := _media_token(sample):
                    report.damaged.append(Damage(sample.id, "", errors.UNUSABLE, f"its text contains {token}"))
                    continue
                for media in sample.media:
                    report.media[media.kind] = report.media.get(media.kind, 0) + 1
                    result = found[media]
                    if isinstance(result, MediaError):
                        report.damaged.append(Damage(sample.id, result.path, result.reason, result.detail))
                        break
                    if media.kind == "video":
                        clips[media.path] = result
    report.seconds = sum(clips.values())
    report.durations = _histogram(clips.values())


def _media_token(sample: Sample) -> str | None:
    """A media token in the sample's own words, which no run would take."""
    text = "\n".join([*(turn.content for turn in sample.turns), sample.answer or ""])
    return next((token for token in MEDIA_TOKENS if token in text), None)


def _histogram(durations: Iterable[float]) -> dict[str, int]:
    names = [f"up to {edge:g} s" for edge in DURATION_EDGES] + [f"over {DURATION_EDGES[-1]:g} s"]
    counts = Counter(sum(seconds > edge for edge in DURATION_EDGES) for seconds in durations)
    return {name: counts[at] for at, name in enumerate(names) if counts[at]}


def _chunks(manifest: Manifest, size: int) -> Iterable[list[Sample]]:
    return (manifest[start : start + size] for start in range(0, len(manifest), size))


def _check_overlaps(report: Report, manifest: Manifest, evaluations: Sequence[Manifest]) -> None:
    """Duplicates within the manifest, and what it shares with evaluations; media count as equal by content."""
    prints: dict[str, bytes] = {}
    others: dict[bytes, tuple[str, str]] = {}
    other_media: dict[bytes, tuple[str, str]] = {}
    for evaluation in evaluations:
        for sample in evaluation:
            where = (str(evaluation.path), sample.id)
            others.setdefault(_sample_print(sample, prints), where)
            for media in sample.media:
                other_media.setdefault(media_print(media, prints), where)
    seen: dict[bytes, str] = defaultdict(str)
    for sample in manifest:
        whole = _sample_print(sample, prints)
        if whole in seen:
            report.duplicates.append((sample.id, seen[whole]))
        else:
            seen[whole] = sample.id
        shared = [
            other_media[key] for key in (media_print(media, prints) for media in sample.media) if key in other_media
        ]
        if whole in others:
            report.leaks.append(Leak(sample.id, *others[whole], "same media and question"))
        elif shared:
            report.leaks.append(Leak(sample.id, *shared[0], "same media"))


def _sample_print(sample: Sample, prints: dict[str, bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for turn in sample.turns:
        if turn.role != "system":
            digest.update(" ".join(turn.content.lower().split()).encode() + b"\0")
    for media in sample.media:
        digest.update(media_print(media, prints) + f"{media.start}-{media.end}".encode())
    return digest.digest()


def media_print(media: Media, prints: dict[str, bytes]) -> bytes:
    """Of a file's size and both its ends; of its path where it cannot be read."""
    if media.path not in prints:
        digest = hashlib.blake2b(digest_size=16)
        try:
            size = os.path.getsize(media.path)
            with open(media.path, "rb") as file:
                digest.update(str(size).encode() + file.read(FINGERPRINT_BYTES))
                if size > FINGERPRINT_BYTES:
                    file.seek(max(size - FINGERPRINT_BYTES, FINGERPRINT_BYTES))
                    digest.update(file.read())
        except OSError:
            digest.update(media.path.encode())
        prints[media.path] = digest.digest()
    return prints[media.path]
