"""Packed attention against one dense mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dppo_mcore.model import attention, flex
from dppo_mcore.model.attention import Segment, find_segments, plan_attention
from dppo_mcore.runtime import device

HEADS, KV_HEADS, DIM = 4, 2, 8


def rows(*groups: tuple[int, tuple[int, ...]], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Segment and branch numbers of (prompt length, response lengths) groups."""
    segments, branches = [], []
    for number, (prompt, responses) in enumerate(groups):
        segments += [number] * (prompt + sum(responses))
        branches += [0] * prompt + [g + 1 for g, length in enumerate(responses) for _ in range(length)]
    return (
        torch.tensor(segments + [-1] * padding, dtype=torch.int32),
        torch.tensor(branches + [0] * padding, dtype=torch.int32),
    )


def dense(q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, segments_L: Tensor, branches_L: Tensor) -> Tensor:
    """The definition: j <= i, same segment, and j in the prompt or in i's own branch."""
    place = torch.arange(len(segments_L))
    seen = (segments_L[:, None] == segments_L) & (place[:, None] >= place)
    seen &= (branches_L == 0) | (branches_L[:, None] == branches_L)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k_LGD, v_LGD))
    scores = torch.einsum("ihd,jhd->hij", q_LHD, k) * q_LHD.shape[-1] ** -0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


CASES = {
    "plain": rows((5, ()), (1, ()), (9, ())),
    "shared": rows((6, (3, 1, 4)), padding=2),
    "several": rows((4, (2,)), (7, ()), (3, (1, 5, 2, 2)), padding=5),
    "long-responses": rows((10, (30, 3, 40, 20))),
}


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_mask(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "RESPONSE_CHUNK", 32)
    monkeypatch.setattr(flex, "compiled_flex", lambda: flex_attention)  # compiled, it wants a C++ compiler here
    segments_L, branches_L = CASES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(segments_L), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(len(segments_L), HEADS, DIM, generator=generator, dtype=torch.float64)
    expected = dense(*inputs, segments_L, branches_L)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    plan = plan_attention(segments_L, branches_L, backend)
    if backend == "flex":  # no backward pass on a CPU
        got = plan.attend(1, *(x.detach() for x in inputs), DIM**-0.5)
        torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-6)
        return
    got = plan.attend(1, *inputs, DIM**-0.5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_spans_are_read_off_the_row() -> None:
    found = find_segments(*rows((4, (2, 1)), (3, ()), padding=2))
    assert found == (Segment((0, 4), ((4, 6), (6, 7))), Segment((7, 10)), Segment((10, 12)))


def test_no_mask_is_as_large_as_the_row() -> None:
    """The masks of a long group grow with its responses, not with the square of the row."""
    segments_L, branches_L = rows((3000, (40,) * 8))
    plan = plan_attention(segments_L, branches_L, "sdpa")
    q, k, v = (torch.randn(len(segments_L), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    plan.attend(1, q, k, v, 1.0)
    assert sum(mask.numel() for mask in plan.masks.values()) <= 320 * len(segments_L)


@pytest.mark.parametrize(
    ("segments", "branches", "message"),
    [
        ([0, 0, 1, 0], [0, 0, 0, 0], "is split"),
        ([0, 0, 1, 1], [0, 0, 1, 1], "does not start with its prompt"),
        ([0, 0, 0], [0, 1, 0], "prompt tokens after a response"),
    ],
)
def test_rows_out_of_order_are_refused(segments: list[int], branches: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_segments(torch.tensor(segments), torch.tensor(branches))


def test_flash_refuses_shared_prompts_by_its_flag() -> None:
    with pytest.raises(ValueError, match="--attention-backend flash"):
        plan_attention(*rows((4, (2, 1))), "flash")


def test_flash_takes_single_answers_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without shared prompts a packed answer is one response behind its prompt: plain causal attention."""
    monkeypatch.setattr(attention, "_flash_varlen", lambda: object())
    plan = plan_attention(*rows((4, (2,)), (3, ()), (5, (1,))), "flash")
    assert plan.cu_seqlens is not None
    assert plan.cu_seqlens.tolist() == [0, 6, 9, 15] and plan.max_seqlen == 6


@pytest.mark.parametrize("seed", range(6))
def test_block_tables_cover_what_is_visible(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is touched exactly where a pair in it is visible, and a full one is visible throughout."""
    monkeypatch.setattr(flex, "BLOCK", 8)
    generator = torch.Generator().manual_seed(seed)

    def length(most: int) -> int:
        return int(torch.randint(1, most, (), generator=generator))

    groups = [(length(60), tuple(length(30) for _ in range(length(5) - 1))) for _ in range(length(5))]
    segments_L, branches_L = rows(*groups, padding=length(9))
    place = torch.arange(len(segments_L))
    seen = (segments_L[:, None] == segments_L) & (place[:, None] >= place)
    seen &= (branches_L == 0) | (branches_L[:, None] == branches_L)
    touched, full = flex.block_tables(find_segments(segments_L, branches_L), len(segments_L))
    block = place // 8
    count = len(touched)
    any_seen = torch.zeros(count, count, dtype=torch.int64)
    any_seen.index_put_((block[:, None].expand_as(seen), block.expand_as(seen)), seen.long(), accumulate=True)
    assert torch.equal(touched, any_seen > 0)
    assert bool((any_seen[full] == 64).all())
    assert not bool((full & ~touched).any())


def test_kernels_visit_exactly_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlexAttention's kernels walk the mask, forward by query blocks and backward by key blocks: full blocks
    unmasked, the others through the mask function."""
    monkeypatch.setattr(flex, "BLOCK", 16)
    segments_L, branches_L = rows((40, (9, 30, 17)), (5, ()), (70, (3,)), padding=6)
    length = len(segments_L)
    mask = flex.block_mask(find_segments(segments_L, branches_L), segments_L, branches_L)
    place = torch.arange(length)
    zero = torch.zeros((), dtype=torch.int64)
    allowed = mask.mask_mod(zero, zero, place[:, None], place[None, :])
    seen = (segments_L[:, None] == segments_L) & (place[:, None] >= place)
    seen &= (branches_L == 0) | (branches_L[:, None] == branches_L)
    assert torch.equal(allowed, seen)
    for backward, partial, full in (
        (False, (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)),
        (True, (mask.q_num_blocks, mask.q_indices), (mask.full_q_num_blocks, mask.full_q_indices)),
    ):
        visits = torch.zeros(length, length, dtype=torch.int64)
        for (counts, order), visible in ((partial, allowed), (full, torch.ones_like(allowed))):
            for row, count in enumerate(counts[0, 0].tolist()):
                for column in order[0, 0, row, :count].tolist():
                    q, k = (column, row) if backward else (row, column)
                    block = slice(16 * q, 16 * q + 16), slice(16 * k, 16 * k + 16)
                    visits[block] += visible[block].long()
        assert torch.equal(visits, seen.long())
    assert int(mask.full_kv_num_blocks.sum()) > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "name"), [("flex", "plain"), ("flex", "several"), ("flex", "long-responses"), ("flash", "plain")]
)
def test_cuda_backends_equal_the_dense_mask(backend: str, name: str) -> None:
    """In bf16 on the device, forward and backward, against fp32."""
    segments_L, branches_L = CASES[name]
    where = device.device()
    generator = torch.Generator().manual_seed(0)
    shapes = ((len(segments_L), heads, 64) for heads in (HEADS, KV_HEADS, KV_HEADS))
    exact = [torch.randn(shape, generator=generator).to(where).requires_grad_() for shape in shapes]
    expected = dense(*exact, segments_L.to(where), branches_L.to(where))
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    rough = [x.detach().bfloat16().requires_grad_() for x in exact]
    got = plan_attention(segments_L, branches_L, backend).attend(1, *rough, 64**-0.5)
    assert float((got - expected).abs().max()) < 0.05
    for a, b in zip(torch.autograd.grad(got.float().square().sum(), rough), wanted, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 0.05
