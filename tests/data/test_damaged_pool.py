"""A pool of 1000 clips of which 50 are damaged in eight ways is used to its last good clip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dppo_mcore.config import DataConfig
from dppo_mcore.data.ahead import PromptSource
from dppo_mcore.data.loader import Batches
from dppo_mcore.data.manifest import read_manifest
from dppo_mcore.data.messages import Request
from dppo_mcore.data.packing import pack_conversations
from dppo_mcore.data.quarantine import Quarantine
from tests.data.clips import write_clip
from tests.data.damage import WAYS

ROOT = Path(__file__).resolve().parents[2]
CLIPS, DAMAGED = 1000, 50
KINDS = (*WAYS, "outside")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The manifest, and the way of damage by sample id."""
    return make_pool(tmp_path_factory.mktemp("pool"))


def make_pool(folder: Path) -> tuple[Path, dict[str, str]]:
    """Writes the clips; returns the manifest and the way of damage by sample id."""
    good = [
        write_clip(folder / f"good{n}.mp4", codec, frames=16, fps=8, size=(56, 56))
        for n, codec in enumerate(("h264", "mpeg4", "h264"))
    ]
    streaming = write_clip(folder / "streaming.mp4", "mpeg4", frames=16, fps=8, size=(56, 56), streaming=True)
    ways = {f"clip{n * (CLIPS // DAMAGED):04d}": KINDS[n % len(KINDS)] for n in range(DAMAGED)}
    rows = []
    for number in range(CLIPS):
        name = f"clip{number:04d}"
        path = folder / f"{name}.mp4"
        way = ways.get(name)
        if way is None:
            os.link(good[number % len(good)], path)
        elif way != "outside":
            WAYS[way][0]({"truncated": streaming, "0 fps": good[1]}.get(way, good[0]), path)
        video = "../elsewhere.mp4" if way == "outside" else path.name
        turns = [{"role": "user", "content": "<video>Was it done?"}, {"role": "assistant", "content": "yes"}]
        rows.append({"id": name, "objective": "success", "video": video, "messages": turns})
    manifest = folder / "pool.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest, ways


def test_one_epoch_over_a_damaged_pool(pool: tuple[Path, dict[str, str]], tiny_dir: str, tmp_path: Path) -> None:
    """Every good clip comes once, every damaged one is named once with the reason that fits."""
    path, ways = pool
    manifest = read_manifest(path)
    assert [row.media for row in manifest.refused] == ["../elsewhere.mp4"] * sum(w == "outside" for w in ways.values())
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    data = DataConfig(data_workers=2, decode_ahead=32, fps=4, media_cache_mib=0)
    source = PromptSource(tiny_dir, data, quarantine=quarantine)
    requests = [Request(sample, 32.0, sample.answer) for sample in manifest]
    batches = Batches(source, requests.__getitem__, len(requests), 62, seed=5, steps=len(requests) // 62 + 1)
    seen: Counter[str] = Counter()
    for prompts in batches:
        seen.update(prompt.sample.id for prompt in prompts)
        rows = pack_conversations(prompts, source.processor.qwen, 2048, 8)
        assert sum(len(row.sequences) for row in rows) == len(prompts)
    source.close()
    bad = {name: way for name, way in ways.items() if way != "outside"}
    assert set(seen) == {sample.id for sample in manifest} - set(bad) and len(seen) == CLIPS - DAMAGED
    written = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert Counter(row["sample_id"] for row in written) == Counter(dict.fromkeys(bad, 1))
    for row in written:
        assert row["reason"] in WAYS[bad[row["sample_id"]]][1], row
        assert row["path"].endswith(row["sample_id"] + ".mp4")
    assert source.metrics()["quarantined"] == len(bad)
    assert Quarantine(tmp_path / "quarantine.jsonl").counts == quarantine.counts


def test_report_names_each_damaged_clip_once(pool: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """`tools/check_data.py` finds all fifty."""
    path, ways = pool
    out = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "tools" / "check_data.py"), "--data", str(path), "--depth", "decode"]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and not done.stderr, done.stderr
    report = json.loads(out.read_text())
    named = Counter([row["sample_id"] for row in report["damaged"]])
    assert named == Counter(dict.fromkeys((name for name, way in ways.items() if way != "outside"), 1))
    assert [row["reason"] for row in report["refused"]] == ["outside the media root"] * len(report["refused"])
    assert len(named) + len(report["refused"]) == DAMAGED
    for row in report["damaged"]:
        assert row["reason"] in WAYS[ways[row["sample_id"]]][1], row
    assert "refused or damaged by reason" in done.stdout
