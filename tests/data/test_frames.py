"""The frame plan's rule, on clips whose every frame's time is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from dppo_mcore.config import DataConfig
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.frames import clip_window, plan_key, plan_media, too_long
from dppo_mcore.data.patches import Geometry
from dppo_mcore.types import FramePlan, Media
from tests.data.clips import write_clip


def plan(path: Path, horizon: float | None = None, start: float | None = None, end: float | None = None,
         **options: object) -> FramePlan:  # fmt: skip
    """Plan with small frames allowed."""
    return plan_media(
        Media("video", str(path), start, end), DataConfig(**{"min_pixels": 784, **options}), horizon, Geometry()
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds at 8 frames per second."""
    return write_clip(tmp_path_factory.mktemp("clips") / "ten.mp4", frames=80, fps=8)


def test_two_frames_per_second(clip: Path) -> None:
    """Every fourth frame, a second per temporal patch."""
    found = plan(clip)
    assert found.indices == tuple(range(0, 80, 4))
    assert found.times == tuple(n / 2 for n in range(20))
    assert (found.grid, found.size, found.seconds_per_grid) == ((10, 4, 4), (56, 56), 1.0)


def test_rate_above_the_clips_own_takes_each_frame_once(clip: Path) -> None:
    """Asked for 30 fps, an 8 fps clip gives its 80 frames, a quarter second per patch."""
    found = plan(clip, fps=30.0)
    assert found.indices == tuple(range(80)) and found.seconds_per_grid == 0.25


def test_frame_budget_thins(clip: Path) -> None:
    """At most `max_frames`, still over the whole window, with the seconds that really lie between."""
    found = plan(clip, max_frames=7)
    assert len(found.indices) == 6 and found.seconds_per_grid == pytest.approx(20 / 6, abs=1e-6)
    assert found.indices == (0, 13, 26, 40, 53, 66)


def test_horizon_keeps_the_end(clip: Path) -> None:
    """A longer clip is windowed to its last seconds by default; the option chooses otherwise."""
    assert plan(clip, horizon=4.0).indices == tuple(range(48, 80, 4))
    assert plan(clip, horizon=4.0, horizon_keep="start").indices == tuple(range(0, 32, 4))
    assert plan(clip, horizon=4.0, horizon_keep="middle").indices == tuple(range(24, 56, 4))
    assert plan(clip, horizon=32.0).indices == plan(clip).indices


def test_clip_window_comes_before_the_horizon(clip: Path) -> None:
    """Start and end of the sample, then the horizon inside them."""
    assert plan(clip, start=2.0, end=6.0).indices == tuple(range(16, 48, 4))
    assert plan(clip, horizon=2.0, start=2.0, end=6.0).indices == tuple(range(32, 48, 4))
    assert plan(clip, start=9.0, end=99.0).indices == (72, 76)
    with pytest.raises(MediaError, match="correct start and end"):
        plan(clip, start=10.5)


def test_frame_count_is_even(tmp_path: Path) -> None:
    """Odd lengths and single frames too."""
    for frames, count in ((1, 2), (2, 2), (9, 2), (13, 4), (21, 6)):
        found = plan(write_clip(tmp_path / f"{frames}.mp4", frames=frames, fps=8))
        assert len(found.indices) == count and found.grid[0] * 2 == count


def test_slow_clip_repeats_what_is_on_screen(tmp_path: Path) -> None:
    """A frame that stands for three seconds is the frame seen in those seconds."""
    times = [0.0, 0.5, 1.0, 1.5, 2.0, 5.0, 5.5, 6.0, 6.1, 6.2, 6.3, 6.4]
    found = plan(write_clip(tmp_path / "slow.mp4", frames=12, times=times))
    for target, time in zip([n * found.seconds_per_grid / 2 for n in range(12)], found.times, strict=True):
        assert time == max(t for t in times if t <= target + 2e-3)


def test_odd_rates_keep_whole_positions(tmp_path: Path) -> None:
    """Timestamps rounded to milliseconds don't move seconds per patch off the asked rate."""
    times = [round(n * 1001 / 30000, 3) for n in range(90)]
    assert plan(write_clip(tmp_path / "ntsc.mp4", frames=90, fps=30, times=times)).seconds_per_grid == 1.0


def test_clip_pixel_budget(clip: Path, tmp_path: Path) -> None:
    """Frames shrink where the clip as a whole would be too large, never below the smallest frame."""
    large = write_clip(tmp_path / "large.mp4", frames=40, size=(240, 320))
    alone, all_of_it = plan(large), plan(large, max_clip_pixels=10 * 100 * 100)
    assert alone.size == (252, 308)
    assert all_of_it.size[0] * all_of_it.size[1] * len(all_of_it.indices) <= 10 * 100 * 100
    assert plan(large, max_clip_pixels=1, min_pixels=3136).size[0] >= 28


def test_window_rule() -> None:
    """Numbers only."""
    media = Media("video", "x", 1.0, None)
    assert clip_window(media, 100.0, 32.0, "end") == (68.0, 100.0)
    assert clip_window(media, 100.0, 32.0, "start") == (1.0, 33.0)
    assert clip_window(media, 100.0, 32.0, "middle") == (34.5, 66.5)
    assert clip_window(media, 20.0, 32.0, "end") == (1.0, 20.0)


def test_plan_key_tells_plans_apart(clip: Path) -> None:
    """Equal plans have equal keys; another window or size has another."""
    keys = {plan_key(plan(clip, **options)) for options in ({}, {"horizon": 4.0}, {"fps": 1.0}, {"min_pixels": 9000})}
    assert len(keys) == 4 and plan_key(plan(clip)) == plan_key(plan(clip))


def test_clips_that_no_prompt_holds_are_foreseen(tmp_path: Path) -> None:
    """By the figures of the largest clip that the options allow, which are those of its plan."""
    data = DataConfig(fps=2, max_frames=16, max_pixels=12544, max_clip_pixels=12544 * 16, min_pixels=784)
    path = write_clip(tmp_path / "x.mp4", frames=80, size=(112, 112))
    for horizon, frames, tokens in ((4.0, 8, 64), (9.0, 16, 128)):
        t, h, w = plan_media(Media("video", str(path)), data, horizon, Geometry()).grid
        assert (t * 2, t * h * w // 4) == (frames, tokens)
        assert too_long(data, (horizon,), Geometry(), tokens) == ""
        line = too_long(data, (2.0, horizon), Geometry(), tokens - 1)
        assert f"{tokens - 1} are fewer than the {tokens} that a clip of {horizon:g} s may take ({frames} fr" in line
    assert "frames above 11760 pixels will be refused" in line and "max_clip_pixels" in line
