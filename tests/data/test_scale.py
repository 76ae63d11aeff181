"""Sizes that take a while: a million rows, hundreds of clips in a row."""

from __future__ import annotations

from pathlib import Path

import bench_video
import pytest

pytestmark = pytest.mark.slow


def test_a_million_rows_open_in_little_memory(tmp_path: Path) -> None:
    """The whole process, imports included."""
    figures = bench_video.bench_manifest(tmp_path, 1_000_000)
    assert figures["rows"] == 1_000_000 and figures["rss_mb"] < 300


def test_300_clips_leave_no_memory_behind(tmp_path: Path) -> None:
    """Resident memory grows by less than 50 MB."""
    bench_video.write_clip(tmp_path / "clip.mp4", 4, 320, 240)
    assert bench_video.bench_memory(str(tmp_path / "clip.mp4"), 300)["rss_growth_mb"] < 50
