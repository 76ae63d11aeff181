"""The vision tower against transformers', its attention calls, and frames dealt over ranks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.media import share_frames
from dppo_mcore.model.vision import VisionTower, plan_frames
from tests.model.harness import TRAIN_ALL, encode_and_differentiate, layout, optimizer_elements
from tests.model.reference import load_reference
from tests.support.rank_pool import RankPool

GRIDS = ((1, 4, 6), (3, 4, 4), (2, 8, 12), (1, 2, 2), (2, 10, 6))


@pytest.fixture(scope="module")
def towers(tiny_dir: str, qwen: QwenConfig) -> tuple[Any, VisionTower]:
    """The oracle's tower and ours with its weights."""
    theirs = load_reference(tiny_dir).model.visual
    ours = VisionTower(qwen.vision)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random_patches(qwen: QwenConfig, grids: tuple[tuple[int, int, int], ...] = GRIDS) -> torch.Tensor:
    """Patches of media of these grids."""
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, qwen.vision.patch_values, generator=torch.Generator().manual_seed(3))


def frames_of(grids: tuple[tuple[int, int, int], ...]) -> list[tuple[int, int]]:
    """Height and width of every frame."""
    return [(h, w) for t, h, w in grids for _ in range(t)]


def test_equals_transformers(qwen: QwenConfig, towers: tuple[Any, VisionTower]) -> None:
    theirs, ours = towers
    patches_P = random_patches(qwen)
    expected = theirs(patches_P, grid_thw=torch.tensor(GRIDS)).pooler_output
    got = ours(patches_P, frames_of(GRIDS))
    assert float((got - expected).abs().max() / expected.abs().max()) <= 2e-6
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    for model, output in ((theirs, expected), (ours, got)):
        model.zero_grad()
        (output * weight).sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = wanted[name].grad
        assert float((parameter.grad - reference).abs().max() / reference.abs().max()) <= 1e-5, name


def test_released_windows_equal_transformers(tiny_dir: str, qwen: QwenConfig) -> None:
    """112-pixel windows, whole and cut, of frames narrower, wider and of odd sizes."""
    reference = load_reference(tiny_dir).model.visual
    config = copy.deepcopy(reference.config)
    config.window_size = 112
    theirs = type(reference)._from_config(config, attn_implementation="eager").eval()
    theirs.load_state_dict(reference.state_dict())
    ours = VisionTower(replace(qwen.vision, window_size=112))
    ours.load_state_dict(reference.state_dict())
    grids = ((1, 10, 18), (2, 8, 8), (1, 2, 30), (1, 26, 6), (3, 6, 10))
    patches_P = random_patches(qwen, grids)
    with torch.no_grad():
        expected = theirs(patches_P, grid_thw=torch.tensor(grids)).pooler_output
        got = ours(patches_P, frames_of(grids))
    assert float((got - expected).abs().max() / expected.abs().max()) <= 2e-6


def test_released_window_geometry(qwen: QwenConfig) -> None:
    """112-pixel windows of 4 x 4 tokens: a 5 x 9 token frame has windows of 16, 16, 4, 4, 4, 1 tokens."""
    vision = replace(qwen.vision, window_size=112)
    spans = plan_frames([(10, 18)], vision, torch.device("cpu")).windows
    assert (spans.cu_seqlens.diff() // 4).tolist() == [16, 16, 4, 4, 4, 1]


def test_windows_share_one_call_and_frames_one_per_size(qwen: QwenConfig) -> None:
    layout_ = plan_frames(frames_of(GRIDS), qwen.vision, torch.device("cpu"))
    assert len(layout_.windows.groups) == 1
    assert len(layout_.frames.groups) == len({h * w for _, h, w in GRIDS})


def test_frozen_tower_keeps_no_activations(qwen: QwenConfig) -> None:
    tower = VisionTower(qwen.vision)
    tower.freeze(tower=True, merger=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        embeddings = tower(random_patches(qwen), frames_of(GRIDS))
    assert not kept
    assert not embeddings.requires_grad


def test_frozen_parts_have_no_optimizer_state(pool2: RankPool, tiny_dir: str) -> None:
    """Freezing removes exactly the frozen parameters from the optimizer."""
    counts = {
        frozen: pool2.run(optimizer_elements, tiny_dir, layout(), replace(TRAIN_ALL, freeze_vision=frozen))[0]
        for frozen in (False, True)
    }
    assert counts[False]["optimizer"] == counts[False]["language"] + counts[False]["vision"]
    assert counts[True]["optimizer"] == counts[True]["language"] + counts[True]["merger"]


def test_frozen_tower_leaves_the_merger_learning(qwen: QwenConfig) -> None:
    tower = VisionTower(qwen.vision)
    tower.freeze(tower=True, merger=False)
    tower(random_patches(qwen), frames_of(GRIDS)).sum().backward()
    learning = {name.split(".")[0] for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert learning == {"merger"}


def test_recomputed_blocks_give_the_same_gradients(qwen: QwenConfig, towers: tuple[Any, VisionTower]) -> None:
    _, ours = towers
    gradients = []
    for recompute in (False, True):
        ours.recompute = recompute
        ours.zero_grad()
        ours(random_patches(qwen), frames_of(GRIDS)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
    ours.recompute = False
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_frames_are_dealt_by_patches() -> None:
    """One large image and eight small frames: the image alone against all the frames."""
    shares = share_frames(((1, 8, 8), (8, 2, 4)), 2, 4)
    assert shares.frames == ((0,), (1, 2, 3, 4, 5, 6, 7, 8))
    together = torch.cat([shares.rows(rank, in_units=False) for rank in range(2)])
    assert torch.equal(together.sort().values, torch.arange(128))


@pytest.mark.parametrize(
    "grids", [((4, 8, 8),), ((1, 4, 6),), GRIDS], ids=["eight-frame-clip", "fewer-frames-than-ranks", "mixed"]
)
def test_sharded_frames_equal_the_whole_tower(
    pool2: RankPool, tiny_dir: str, qwen: QwenConfig, grids: tuple[tuple[int, int, int], ...]
) -> None:
    """At TP2 embeddings and gradients are those of one rank; a clip costs each rank about half the operations."""
    arguments = (tiny_dir, TRAIN_ALL, random_patches(qwen, grids), grids)
    whole = pool2.run(encode_and_differentiate, layout(), *arguments)[0]
    halves = pool2.run(encode_and_differentiate, layout(2), *arguments)
    for half in halves:
        scale = whole["embeddings"].abs().max()
        assert float((half["embeddings"] - whole["embeddings"]).abs().max() / scale) <= 1e-6
        for name, gradient in whole["gradients"].items():
            error = (half["gradients"][name] - gradient).abs().max() / gradient.abs().max()
            assert float(error) <= 1e-6, name
    if grids == ((4, 8, 8),):
        assert max(half["flops"] for half in halves) <= 0.55 * whole["flops"]
