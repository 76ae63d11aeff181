"""The report on a manifest: counts, durations, duplicates, leaks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import check_data
import pytest

from dppo_mcore.data import check
from dppo_mcore.data.check import check_manifest
from dppo_mcore.data.manifest import Manifest, read_manifest
from dppo_mcore.data.patches import load_geometry
from dppo_mcore.rewards import registry
from dppo_mcore.types import FramePlan
from tests.data.clips import write_clip


def manifest(folder: Path, name: str, rows: list[tuple[str, str, str]]) -> Manifest:
    """Rows of (id, clip, question)."""
    path = folder / name
    path.write_text(
        "".join(
            json.dumps({"id": i, "dimension": "Temporal & Sequential", "video": clip, "gold": "yes",
                        "messages": [{"role": "user", "content": f"<video>{question}"}]}) + "\n"
            for i, clip, question in rows
        )
    )  # fmt: skip
    return read_manifest(path)


def test_report(tmp_path: Path) -> None:
    """A copy of a clip under another name is the same clip."""
    write_clip(tmp_path / "a.mp4", frames=40)
    write_clip(tmp_path / "b.mp4", frames=16)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    pool = manifest(
        tmp_path, "pool.jsonl",
        [("1", "a.mp4", "Done?"), ("2", "copy.mp4", "done? "), ("3", "b.mp4", "Where?"), ("4", "a.mp4", "When?")],
    )  # fmt: skip
    evaluation = manifest(tmp_path, "eval.jsonl", [("e1", "a.mp4", "When?"), ("e2", "gone.mp4", "What?")])
    report = check_manifest(pool, [evaluation])
    assert report.objectives == {"success": 4} and report.dimensions == {"Temporal & Sequential": 4}
    assert report.media == {"video": 4} and report.durations == {"up to 4 s": 1, "up to 8 s": 2}
    assert report.seconds == pytest.approx(12.0) and report.duplicates == [("2", "1")]
    assert [(leak.sample_id, leak.other_id, leak.why) for leak in report.leaks] == [
        ("1", "e1", "same media"), ("2", "e1", "same media"), ("4", "e1", "same media and question")
    ]  # fmt: skip
    assert not report.ok() and not report.damaged
    broken = check_manifest(evaluation, depth="rows")
    assert broken.ok() and not check_manifest(evaluation).ok()


def test_media_tokens_in_text_are_found(tmp_path: Path) -> None:
    """What a run would quarantine for its words is named beforehand, once."""
    write_clip(tmp_path / "a.mp4", frames=16)
    pool = manifest(tmp_path, "pool.jsonl", [("1", "a.mp4", "Done?"), ("2", "a.mp4", "What is <|video_pad|>?")])
    report = check_manifest(pool)
    assert [(damage.sample_id, damage.reason) for damage in report.damaged] == [("2", "unusable sample")]
    assert "<|video_pad|>" in report.damaged[0].detail and report.media == {"video": 1}


def test_the_frames_of_every_horizon_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip shorter than two of them once, a longer one for each; sizes are the checkpoint's."""
    write_clip(tmp_path / "short.mp4", frames=16)
    write_clip(tmp_path / "long.mp4", frames=64)
    pool = manifest(tmp_path, "pool.jsonl", [("1", "short.mp4", "Done?"), ("2", "long.mp4", "Done?")])
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16}')
    seen: list[tuple[str, float, float, tuple[int, int]]] = []

    def note(plan: FramePlan) -> None:
        seen.append((Path(plan.path).stem, plan.times[0], plan.times[-1], plan.size))

    monkeypatch.setattr(check, "make_decoder", lambda *_: note)
    geometry = load_geometry(tmp_path)
    assert check_manifest(pool, depth="decode", workers=1, horizons=(2.0, 4.0, 4.0), geometry=geometry).ok()
    assert seen == [
        ("short", 0.0, 1.5, (64, 64)), ("long", 6.0, 7.5, (64, 64)), ("long", 4.0, 7.5, (64, 64))
    ]  # fmt: skip
    seen.clear()
    command = ["check_data.py", "--data", str(tmp_path / "pool.jsonl"), "--depth", "decode", "--horizons", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--model", str(tmp_path)])
    assert check_data.main() == 0 and sorted(clip for clip, *_ in seen) == ["long", "short"]


def test_objectives_without_a_scorer_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the tool too, with status 1: a misspelt one would cost every answer its reward."""
    path = tmp_path / "pool.jsonl"
    turns = [{"role": "user", "content": "?"}]
    path.write_text("".join(json.dumps({"objective": name, "messages": turns}) + "\n" for name in ("exact", "colour")))
    monkeypatch.setattr(registry, "_SCORERS", dict(registry._SCORERS))
    own = ["--objectives", str(Path(__file__).resolve().parents[2] / "examples" / "own_rewards.py")]
    for flags, status in (([], 1), (["--only-learnt"], 0), (own, 0)):
        monkeypatch.setattr(sys, "argv", ["check_data.py", "--data", str(path), *flags])
        assert check_data.main() == status
        assert ("no scorer for objective 'colour' (1 rows" in capsys.readouterr().out) == (status == 1)
    monkeypatch.setattr(sys, "argv", ["check_data.py", "--data", str(path), "--objectives", "none.py"])
    with pytest.raises(SystemExit):
        check_data.main()
    assert "objectives: no file" in capsys.readouterr().err
