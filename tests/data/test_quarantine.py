"""What was set aside stays so in a run that goes on, until its files are others."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dppo_mcore.config import DataConfig
from dppo_mcore.data import errors
from dppo_mcore.data.ahead import PromptSource
from dppo_mcore.data.errors import DataError, MediaError
from dppo_mcore.data.messages import Request
from dppo_mcore.data.quarantine import Quarantine
from dppo_mcore.types import Media, Sample, Turn
from tests.data.clips import write_clip


def asking(name: str, *paths: Path) -> Sample:
    media = tuple(Media("video", str(path)) for path in paths)
    return Sample(name, "success", (Turn("user", "<video>" * len(paths) + "Done?"),), media)


def test_what_is_unchanged_stays_out(tmp_path: Path) -> None:
    """A file that is still missing or still broken, one that had no say in it, and an older version's entry."""
    broken, clip, file = tmp_path / "broken.mp4", tmp_path / "clip.mp4", tmp_path / "run" / "quarantine-0.jsonl"
    broken.write_bytes(b"no clip")
    clip.write_bytes(b"a clip")
    gone, bad, long = asking("gone", tmp_path / "gone.mp4"), asking("bad", clip, broken), asking("long", clip)
    first = Quarantine(file)
    assert first.add("gone", MediaError(gone.media[0].path, errors.MISSING), gone.media)
    assert first.add("bad", MediaError(str(broken), errors.UNREADABLE, "no container"), bad.media)
    assert first.add("long", DataError("5000 prompt tokens")) and not first.add("long", DataError("5000 prompt tokens"))
    assert not first.add("gone", MediaError(gone.media[0].path, errors.MISSING), gone.media)
    with open(file, "a") as old:
        old.write(json.dumps({"sample_id": "old", "path": "x.mp4", "reason": errors.MISSING, "detail": ""}) + "\n")
        old.write('{"sample_id": "half", "pa')
    os.utime(clip)  # of the long one only its words are at fault
    os.utime(broken, ns=(0, broken.stat().st_mtime_ns))
    again = Quarantine(file)
    assert [entry.sample_id for entry in again.entries()] == ["gone", "long", "old"]
    os.utime(clip, ns=(0, int(json.loads(file.read_text().splitlines()[1])["files"][str(clip)].split()[1])))
    assert [entry.sample_id for entry in Quarantine(file).entries()] == ["gone", "bad", "long", "old"]
    assert all(Quarantine(file).of(sample) for sample in (gone, bad, long, asking("old", clip)))
    assert str(Quarantine(file).of(bad)) == f"sample 'bad': {broken}: not a media file: no container"


def test_another_root_is_tried(tmp_path: Path) -> None:
    """The same sample with its clip elsewhere isn't known to be damaged, and may be noted once more."""
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    wrong, right = asking("s", tmp_path / "wrong" / "1.mp4"), asking("s", tmp_path / "right" / "1.mp4")
    quarantine.add("s", MediaError(wrong.media[0].path, errors.MISSING), wrong.media)
    assert quarantine.of(wrong) and not quarantine.of(right)
    assert quarantine.add("s", MediaError(right.media[0].path, errors.EMPTY), right.media)
    for found in (quarantine, Quarantine(tmp_path / "quarantine.jsonl")):
        assert (found.of(wrong).reason, found.of(right).reason) == (errors.MISSING, errors.EMPTY)
        assert found.counts == {errors.MISSING: 1, errors.EMPTY: 1}
    quarantine.keep_for(lambda name: [right] if name == "s" else [])
    assert [entry.reason for entry in quarantine.entries()] == [errors.EMPTY] and quarantine.counts == {errors.EMPTY: 1}
    quarantine.keep_for(lambda name: [])
    assert not len(quarantine)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_came_is_used_when_the_run_goes_on(tmp_path: Path, tiny_dir: str, workers: int) -> None:
    """Missing, then half copied, then whole; within a process it stays out."""
    request = Request(asking("s", tmp_path / "1.mp4"))
    whole = write_clip(tmp_path / "whole.mp4", frames=16, size=(56, 56))

    def taken(source: PromptSource) -> bool:
        return source.take(request) is not None

    def started() -> PromptSource:
        return PromptSource(tiny_dir, DataConfig(data_workers=workers), quarantine=Quarantine(tmp_path / "q.jsonl"))

    for content, expected in ((None, False), (whole.read_bytes()[:100], False), (whole.read_bytes(), True)):
        if content is not None:
            Path(request.sample.media[0].path).write_bytes(content)
        source = started()
        assert taken(source) == expected and (source.plan(replace(request)) is not None) == expected
        source.close()
    assert [json.loads(line)["reason"] for line in (tmp_path / "q.jsonl").read_text().splitlines()] == [
        errors.MISSING, errors.UNREADABLE
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_too_long_serves_for_something_else(tmp_path: Path, tiny_dir: str, workers: int) -> None:
    """Refused for one horizon, or to be learnt, before anything is decoded; once each, also in a run that goes on."""
    clip = write_clip(tmp_path / "1.mp4", frames=64, size=(56, 56))
    sample = asking("s", clip)
    sizes = PromptSource(tiny_dir, DataConfig(data_workers=0))
    long, short = (len(sizes.plan(Request(sample, seconds)).token_ids) for seconds in (8.0, 2.0))
    asked = Request(sample, 8.0, limit=long - 1)
    data = DataConfig(data_workers=workers, max_conversation_tokens=short // 2)
    for _ in range(2):
        source = PromptSource(tiny_dir, data, quarantine=Quarantine(tmp_path / "q.jsonl"))
        source.prefetch([asked])
        source.plan_ahead([asked])
        assert source.plan(asked) is source.take(asked) is source.take(replace(asked, limit=None, answer="yes")) is None
        assert not source.metrics().get("decode/pyav")
        assert source.take(replace(asked, horizon=2.0)) is not None
        assert source.take(replace(asked, sample=replace(sample, id="other"), limit=long)) is not None
        assert source.metrics()["quarantine/too long"] == 2 and source.quarantine.of(sample) is None
        source.close()
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [(row["reason"], row["use"]) for row in rows] == [
        (errors.TOO_LONG, "prompt of 8 s"), (errors.TOO_LONG, "conversation of 8 s")
    ]  # fmt: skip
    assert f"{long} prompt tokens, above max_prompt_tokens {long - 1}" in rows[0]["detail"]
    assert "leave nothing to learn" in rows[1]["detail"]
    kept = Quarantine(tmp_path / "q.jsonl")
    kept.keep_for(lambda name: [sample])
    assert len(kept) == 2
