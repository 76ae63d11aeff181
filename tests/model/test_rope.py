"""Positions worked out by hand. Grids are in patches; two by two patches make a token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.rope import mrope_positions

TEXT = 7


def image(qwen: QwenConfig, count: int) -> list[int]:
    """Markers around image tokens."""
    return [qwen.vision_start_token_id, *[qwen.image_token_id] * count, qwen.vision_end_token_id]


def video(qwen: QwenConfig, count: int) -> list[int]:
    """Markers around video tokens."""
    return [qwen.vision_start_token_id, *[qwen.video_token_id] * count, qwen.vision_end_token_id]


def rows(positions_3L: torch.Tensor) -> list[list[int]]:
    """Time, row and column positions as lists."""
    return positions_3L.tolist()


def test_text_counts_up_in_all_rows(qwen: QwenConfig) -> None:
    assert rows(mrope_positions([TEXT] * 4, (), (), qwen)) == [[0, 1, 2, 3]] * 3


def test_image_has_one_time_and_text_goes_on_after_its_widest_side(qwen: QwenConfig) -> None:
    """Text 0-1, marker 2; 2 x 3 tokens from 3: rows to 4, columns to 5; so the closing marker is at 6."""
    ids = [TEXT, TEXT, *image(qwen, 6), TEXT]
    assert rows(mrope_positions(ids, [(1, 4, 6)], [None], qwen)) == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]


def test_clip_at_two_frames_per_second(qwen: QwenConfig) -> None:
    """A temporal patch a second, two positions a second: times 1, 3, 5; text after a clip continues at 6."""
    ids = [*video(qwen, 12), TEXT]
    assert rows(mrope_positions(ids, [(3, 4, 4)], [1.0], qwen)) == [
        [0, 1, 1, 1, 1, 3, 3, 3, 3, 5, 5, 5, 5, 6, 7],
        [0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2, 6, 7],
        [0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 6, 7],
    ]


def test_text_after_a_clip_follows_its_last_time(qwen: QwenConfig) -> None:
    """Eleven tokens before it, four positions a second, a second a patch: times 11, 15, 19, then text at 20."""
    faster = replace(qwen, vision=replace(qwen.vision, tokens_per_second=4))
    positions = mrope_positions([TEXT] * 10 + video(qwen, 18), [(3, 4, 6)], [1.0], faster)
    assert positions[0, 11:29].tolist() == [11] * 6 + [15] * 6 + [19] * 6
    assert positions[:, 29].tolist() == [20, 20, 20]


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        (0.25, [0, 0, 1, 1]),  # 8 fps: half a position a patch
        (0.4, [0, 0, 1, 2]),  # 5 fps: 0, 0.8, 1.6, 2.4
        (1.0, [0, 2, 4, 6]),
        (3.7, [0, 7, 14, 22]),  # 0, 7.4, 14.8, 22.2
    ],
)
def test_times_follow_real_seconds_rounded_down(qwen: QwenConfig, seconds: float, times: list[int]) -> None:
    positions = mrope_positions([qwen.video_token_id] * 4, [(4, 2, 2)], [seconds], qwen)
    assert positions[0].tolist() == times


def test_tall_clip_is_followed_by_its_row_maximum(qwen: QwenConfig) -> None:
    """Four rows from 0 to 3 outlast times 0 and 0: text at 4."""
    positions = mrope_positions([qwen.video_token_id] * 8 + [TEXT], [(2, 8, 2)], [0.1], qwen)
    assert positions[:, 8].tolist() == [4, 4, 4]


def test_several_media_with_text_between(qwen: QwenConfig) -> None:
    """Image 1-2 wide from 1; marker 3, text 4, marker 5; clip from 6 at times 6, 9 (rate 3); marker 10."""
    ids = [*image(qwen, 4), TEXT, *video(qwen, 2)]
    assert rows(mrope_positions(ids, [(1, 4, 4), (2, 2, 2)], [None, 1.5], qwen)) == [
        [0, 1, 1, 1, 1, 3, 4, 5, 6, 9, 10],
        [0, 1, 1, 2, 2, 3, 4, 5, 6, 6, 10],
        [0, 1, 2, 1, 2, 3, 4, 5, 6, 6, 10],
    ]


def test_adjacent_media_of_one_kind(qwen: QwenConfig) -> None:
    """Two images without a marker between: the second starts after the first's largest position."""
    ids = [qwen.image_token_id] * 3
    assert rows(mrope_positions(ids, [(1, 2, 4), (1, 2, 2)], [None, None], qwen)) == [[0, 0, 2], [0, 0, 2], [0, 1, 2]]


def test_lost_seconds_are_an_error(qwen: QwenConfig) -> None:
    with pytest.raises(ValueError, match="sample s1: a video has no seconds_per_grid"):
        mrope_positions(video(qwen, 4), [(1, 4, 4)], [None], qwen, name="s1")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_seconds_are_an_error(qwen: QwenConfig, seconds: float) -> None:
    with pytest.raises(ValueError, match="sample s1: a video has seconds_per_grid .*, no time between its frames"):
        mrope_positions(video(qwen, 8), [(2, 4, 4)], [seconds], qwen, name="s1")


def test_a_single_grid_needs_no_time(qwen: QwenConfig) -> None:
    assert mrope_positions(video(qwen, 1), [(1, 2, 2)], [0.0], qwen)[0].tolist() == [0, 1, 2]


def test_media_of_the_other_kind_are_an_error(qwen: QwenConfig) -> None:
    """A clip of one grid has as many features as an image; only its kind gives it away."""
    with pytest.raises(ValueError, match="sample s5: image tokens stand where a video"):
        mrope_positions(image(qwen, 4) + video(qwen, 4), [(1, 4, 4)] * 2, [1.0, None], qwen, name="s5")


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 5), (0, 4, 4)])
def test_grids_that_do_not_merge_are_an_error(qwen: QwenConfig, grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="sample s6: grid .* does not divide"):
        mrope_positions(image(qwen, 2), [grid], [None], qwen, name="s6")


def test_more_features_than_tokens_is_an_error(qwen: QwenConfig) -> None:
    with pytest.raises(ValueError, match="sample s2: 3 media tokens but 1 media with 4 features"):
        mrope_positions(image(qwen, 3), [(1, 4, 4)], [None], qwen, name="s2")


def test_media_tokens_without_a_grid_are_an_error(qwen: QwenConfig) -> None:
    with pytest.raises(ValueError, match="sample s3: 4 media tokens but 0 media"):
        mrope_positions(image(qwen, 4), (), (), qwen, name="s3")


def test_features_across_two_places_are_an_error(qwen: QwenConfig) -> None:
    """Two images of 2 and 4 tokens whose grids come in the wrong order."""
    with pytest.raises(ValueError, match="sample s4: medium with grid"):
        mrope_positions(image(qwen, 2) + image(qwen, 4), [(1, 4, 4), (1, 2, 4)], [None, None], qwen, name="s4")
