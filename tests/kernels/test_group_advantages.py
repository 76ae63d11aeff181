"""group_advantages against a loop in fp64."""

from __future__ import annotations

import pytest
import torch
from dppo_kernels import group_advantages

from tests.kernels.oracle import BACKENDS, DEVICE


def looped(rewards: torch.Tensor, ids: torch.Tensor, scale: str, eps: float = 1e-6) -> torch.Tensor:
    """One group after the other."""
    wide, found = rewards.double(), torch.empty(len(rewards), dtype=torch.float64, device=rewards.device)
    for group in set(ids.tolist()):
        here = wide[ids == group]
        centred = here - here.mean()
        if len(here) == 1 or bool((here == here[0]).all()):
            centred = torch.zeros_like(here)
        deviation = here.std() if len(here) > 1 else torch.zeros(())
        if scale == "batch":
            deviation = wide.std()
        found[ids == group] = centred if scale == "none" else centred / (deviation + eps)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_group_sizes_in_any_order(backend: str, scale: str) -> None:
    source = torch.Generator().manual_seed(0)
    sizes = [1, 2, 3, 7, 8, 300, 16, 1]
    names = [0, -5, 2**62, 7, -(2**62), 123456789012, 1, 3]
    ids = torch.cat([torch.full((size,), name) for size, name in zip(sizes, names, strict=True)])
    ids = ids[torch.randperm(len(ids), generator=source)].to(DEVICE)
    rewards = torch.randn(len(ids), generator=source).to(DEVICE)
    found = group_advantages(rewards, ids, scale=scale, backend=backend)
    right = looped(rewards, ids, scale)
    assert found.dtype == torch.float32
    assert ((found - right).abs() <= 1e-6 * right.abs().clamp(min=1)).all()
    assert (found[(ids == 0) | (ids == 3)] == 0).all()
    assert torch.equal(found, group_advantages(rewards, ids, scale=scale, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_differences_around_a_large_mean(backend: str, dtype: torch.dtype) -> None:
    rewards = (10_000 + 0.1 * torch.arange(8, dtype=torch.float64)).to(DEVICE, dtype)
    ids = torch.tensor([4, 4, 4, 4, 9, 9, 9, 9], device=DEVICE)
    found = group_advantages(rewards, ids, backend=backend)
    right = looped(rewards, ids, "std")
    assert ((found - right).abs() <= 1e-6 * right.abs().clamp(min=1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_constant_groups_are_exactly_zero(backend: str, scale: str) -> None:
    sizes = torch.arange(2, 20)
    for dtype in (torch.float32, torch.float64):  # ten times 0.1 is not 1 in fp64, nor is a tenth of it always 0.1
        values = (torch.arange(len(sizes), dtype=torch.float64) * 0.7 + 0.1).to(dtype)
        rewards = torch.cat([values.repeat_interleave(sizes), torch.tensor([1.0, 2.0], dtype=dtype)]).to(DEVICE)
        ids = torch.cat([sizes.repeat_interleave(sizes), torch.tensor([99, 99])]).to(DEVICE)
        found = group_advantages(rewards, ids, scale=scale, backend=backend)
        assert found.dtype == dtype
        assert (found[:-2] == 0).all() and (found[-2:] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_a_nan_stays_in_its_group(backend: str, scale: str) -> None:
    rewards = torch.tensor([1.0, float("nan"), 3.0, 4.0, 6.0, 5.0, 5.0, float("nan")], device=DEVICE)
    ids = torch.tensor([1, 1, 2, 2, 2, 3, 3, 4], device=DEVICE)
    found = group_advantages(rewards, ids, scale=scale, backend=backend)
    assert found[[0, 1, 7]].isnan().all()
    without = group_advantages(rewards[2:7], ids[2:7], scale=scale, backend=backend)
    if scale == "batch":
        assert found[2:7].isfinite().all()
    else:
        assert torch.equal(found[2:7], without)


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_layouts_and_empty_input(backend: str) -> None:
    rewards, ids = torch.arange(12.0, device=DEVICE), torch.arange(12, device=DEVICE) % 3
    base = group_advantages(rewards, ids, backend=backend)
    assert torch.equal(group_advantages(rewards.bfloat16(), ids.int(), backend=backend), base)
    assert torch.equal(group_advantages(rewards.long(), ids, backend=backend), base)
    doubled = rewards.repeat_interleave(2)[::2], ids.repeat_interleave(2)[::2]
    assert torch.equal(group_advantages(*doubled, backend=backend), base)
    assert group_advantages(rewards[:0], ids[:0], backend=backend).shape == (0,)
    learner = rewards.clone().requires_grad_()
    assert not group_advantages(learner, ids, backend=backend).requires_grad


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="scale='mad'"):
        group_advantages(torch.ones(2), torch.ones(2).long(), scale="mad")
    with pytest.raises(ValueError, match="one id per reward"):
        group_advantages(torch.ones(2), torch.ones(3).long())
    with pytest.raises(TypeError, match="expected integers"):
        group_advantages(torch.ones(2), torch.ones(2))
