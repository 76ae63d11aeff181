"""linear_logprob against fp64, and the ways such kernels go wrong."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dppo_kernels import head_rows, head_rows_triton, linear_logprob
from dppo_kernels.vocab import VocabShard

from tests.kernels import oracle
from tests.kernels.oracle import DEVICE, head_case, relative, worst

ALL = ("torch", "triton", "triton_fused")
LOGPROB_BAR, GRAD_BAR = 5e-6, 2e-6
SMALL = 0.25
"""Workspace in MiB that makes several chunks of these sizes."""


def compare(hidden, weight, targets, backend, temperature=1.0, upstream=(1.0, 1.0), **more):
    """Values and gradients of random upstream gradients against the oracle."""
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    found = linear_logprob(
        *ours, targets, temperature=temperature, entropy=True, workspace_mib=SMALL, backend=backend, **more
    )
    expected = oracle.logprob(*theirs, targets, temperature)
    assert found[0].dtype == torch.float32
    assert worst(found[0], expected[0]) <= LOGPROB_BAR
    assert worst(found[1], expected[1]) <= LOGPROB_BAR
    torch.manual_seed(1)
    grads = [torch.randn(len(targets), device=DEVICE) * factor for factor in upstream]
    for values in grads:
        values[::5] = 0.0
    for pair in (found, expected):
        sum((value * grad).sum() for value, grad in zip(pair, grads, strict=True)).backward()
    for mine, right in zip(ours, theirs, strict=True):
        assert relative(mine.grad, right.grad) <= GRAD_BAR
    return found


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("vocab", [41, 123, 1088, 4752])
def test_odd_vocabularies_hide_no_columns(backend: str, vocab: int) -> None:
    compare(*head_case(70, 16, vocab, seed=vocab), backend)


@pytest.mark.parametrize("vocab", [19008, 152063])
def test_production_vocabularies(vocab: int) -> None:
    compare(*head_case(20, 64, vocab), "torch")
    hidden, weight, targets = head_case(3, 8, 19008)
    found, _ = linear_logprob(hidden, weight, targets, backend="triton")
    assert worst(found, oracle.logprob(hidden, weight, targets)[0]) <= LOGPROB_BAR


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rows", [0, 1, 127, 129, 300])
def test_any_number_of_rows(backend: str, rows: int) -> None:
    if rows == 0:
        hidden, weight, targets = head_case(0, 16, 41)
        hidden.requires_grad_()
        value, entropy = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
        value.sum().backward()
        assert value.shape == entropy.shape == (0,)
        assert hidden.grad.shape == (0, 16)
    else:
        compare(*head_case(rows, 16, 97, seed=rows), backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("temperature", [0.1, 0.6, 1.5])
def test_temperature_reaches_values_and_gradients(backend: str, temperature: float) -> None:
    spread = min(2.5, 4 * temperature)
    compare(*head_case(64, 16, 200, spread=spread), backend, temperature)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("upstream", [(0.0, 1.0), (-3.0, 0.0), (1.0, -0.5)])
def test_upstream_gradients(backend: str, upstream: tuple[float, float]) -> None:
    compare(*head_case(40, 16, 97), backend, upstream=upstream)


@pytest.mark.parametrize("backend", ALL)
def test_only_one_output_is_differentiated(backend: str) -> None:
    hidden, weight, targets = head_case(40, 16, 97)
    for which in (0, 1):
        ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        linear_logprob(ours, weight, targets, entropy=True, backend=backend)[which].sum().backward()
        oracle.logprob(theirs, weight, targets)[which].sum().backward()
        assert relative(ours.grad, theirs.grad) <= GRAD_BAR
    only_weight = weight.clone().requires_grad_()
    linear_logprob(hidden, only_weight, targets, backend=backend)[0].sum().backward()
    assert only_weight.grad is not None


def test_graph_can_be_walked_twice_but_not_differentiated_twice() -> None:
    hidden, weight, targets = head_case(40, 16, 97)
    hidden.requires_grad_()
    value, _ = linear_logprob(hidden, weight, targets)
    value.sum().backward(retain_graph=True)
    once = hidden.grad.clone()
    value.sum().backward()
    assert torch.equal(hidden.grad, once + once)
    value, _ = linear_logprob(hidden, weight, targets)
    (first,) = torch.autograd.grad(value.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shift", [-120.0, 120.0, "rows"])
def test_a_shift_of_all_logits_changes_nothing(backend: str, shift: float | str) -> None:
    hidden, weight, targets = head_case(50, 16, 1088)
    hidden, weight = (hidden * 8).round() / 8, (weight * 16).round() / 16  # exact products: the shift costs no bits
    weight[:, -1] = 1.0
    hidden[:, -1] = 0.0
    base = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
    moved = hidden.clone()
    moved[:, -1] = torch.arange(-120.0, 130.0, 5.0, device=DEVICE) if shift == "rows" else shift
    shifted = linear_logprob(moved, weight, targets, entropy=True, backend=backend)
    assert worst(shifted[0], base[0]) <= 1e-6
    assert worst(shifted[1], base[1]) <= 1e-6


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("vocab", [1088, 123])
def test_peaked_softmax_has_no_phantom_columns(backend: str, vocab: int) -> None:
    weight = torch.full((vocab, 8), -15.0 / 8, device=DEVICE)
    weight[7] = 3.0 / 8
    targets = torch.full((9,), 7, device=DEVICE)
    hidden = torch.ones(9, 8, device=DEVICE)
    learner = weight.clone().requires_grad_()
    found, entropy = linear_logprob(hidden, learner, targets, entropy=True, backend=backend)
    right, right_entropy = oracle.logprob(hidden, weight, targets)
    assert worst(found, right) <= 5e-7 and worst(entropy, right_entropy) <= 1e-6
    found.sum().backward()
    assert worst(learner.grad.sum(0), torch.zeros(8, device=DEVICE)) <= 1e-5


@pytest.mark.parametrize("backend", ALL)
def test_infinitely_unlikely_columns(backend: str) -> None:
    hidden, weight, targets = head_case(30, 16, 9000)
    hidden = hidden.abs() + 0.1
    targets[:] = torch.arange(30, device=DEVICE)
    targets[3] = 5000
    gone = weight.clone()
    gone[4096:] = float("-inf")
    found, entropy = linear_logprob(hidden, gone, targets, entropy=True, backend=backend)
    targets[3] = 0
    right, right_entropy = oracle.logprob(hidden, weight[:4096], targets)
    assert found[3] == float("-inf")
    found[3] = right[3]
    assert worst(found, right) <= 1e-5
    assert worst(entropy, right_entropy) <= 1e-5
    learner = gone[:6000].clone().requires_grad_()
    linear_logprob(hidden, learner, targets, entropy=True, backend=backend)[0].sum().backward()
    assert torch.equal(learner.grad[4096:], torch.zeros_like(learner.grad[4096:]))
    front = gone.flip(0)
    found, _ = linear_logprob(hidden, front, 8999 - targets, backend=backend)
    assert worst(found, right) <= 1e-5


@pytest.mark.parametrize("versions", [head_rows, head_rows_triton])
def test_a_shard_without_a_finite_logit(versions) -> None:
    logits = torch.randn(5, 60, generator=torch.Generator().manual_seed(0)).to(DEVICE) - 150.0
    targets = torch.tensor([0, 7, 13, 29, 2], device=DEVICE)
    logps = torch.log_softmax(logits[:, :30].double(), 1)
    logits[:, 30:] = float("-inf")
    halves = [(VocabShard(first, 30, 60), logits[:, first : first + 30].clone()) for first in (0, 30)]
    for order in (halves, halves[::-1]):
        parts = [versions.chunk_stats(part.clone(), targets, shard, 1.0, True, False) for shard, part in order]
        stats = versions.combine(torch.stack(parts))
        assert worst(stats.logprob_C, logps.gather(1, targets[:, None])[:, 0]) <= LOGPROB_BAR
        assert worst(stats.entropy_C, -(logps.exp() * logps).sum(1)) <= LOGPROB_BAR
    shard, gone = halves[1]
    ones = torch.ones(5, device=DEVICE)
    assert (versions.chunk_grads(gone, targets, shard, 1.0, stats, ones, ones) == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_targets_outside_the_vocabulary(backend: str) -> None:
    hidden, weight, targets = head_case(10, 16, 50, masked=0.0)
    good, _ = linear_logprob(hidden, weight, targets, backend=backend)
    for wrong, options in ((50, {}), (2**40, {}), (47, dict(vocab_size=47))):
        bad = targets.clamp(max=46)
        expected, _ = linear_logprob(hidden, weight, bad, backend=backend, **options)
        bad[4] = wrong
        if DEVICE == "cpu":
            with pytest.raises(IndexError, match=r"targets\[4\]"):
                linear_logprob(hidden, weight, bad, backend=backend, **options)
        else:
            found, _ = linear_logprob(hidden, weight, bad, backend=backend, **options)
            assert found[4].isnan()
            found[4] = expected[4]
            assert torch.equal(found, expected)
    assert good.isfinite().all()


@pytest.mark.parametrize("backend", ALL)
def test_masked_rows_leave_no_trace_whatever_they_hold(backend: str) -> None:
    hidden, weight, targets = head_case(60, 16, 97)
    poison = hidden.clone()
    poison[targets < 0] = float("nan")
    poison[(targets < 0).nonzero()[0]] = float("inf")
    results = []
    for rows in (hidden, poison):
        rows, head = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        value, entropy = linear_logprob(rows, head, targets, entropy=True, backend=backend)
        (value.sum() + entropy.sum()).backward()
        results.append((value.detach(), entropy.detach(), rows.grad, head.grad))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    assert (results[1][2][targets < 0] == 0).all() and (results[1][0][targets < 0] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_all_rows_masked(backend: str) -> None:
    hidden, weight, targets = head_case(20, 16, 97)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    value, entropy = linear_logprob(hidden, weight, targets.fill_(-1), entropy=True, backend=backend)
    (value.sum() + entropy.sum()).backward()
    for zeros in (value, entropy, hidden.grad, weight.grad):
        assert (zeros == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_padding_columns_are_no_part_of_the_vocabulary(backend: str) -> None:
    hidden, weight, targets = head_case(40, 16, 90)
    padded = torch.cat([weight, torch.full((38, 16), 7.0, device=DEVICE)]).requires_grad_()
    found, _ = linear_logprob(hidden, padded, targets, vocab_size=90, backend=backend)
    found.sum().backward()
    assert worst(found, oracle.logprob(hidden, weight, targets)[0]) <= LOGPROB_BAR
    assert (padded.grad[90:] == 0).all() and padded.grad[:90].abs().sum() > 0


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("masked", [0.0, 0.2])
def test_layouts_of_the_inputs(backend: str, masked: float) -> None:
    hidden, weight, targets = head_case(48, 16, 97, masked=masked)
    base, _ = linear_logprob(hidden, weight, targets, backend=backend)
    by_column = hidden.t().contiguous().t()
    sequence_first = hidden.view(6, 8, 16).transpose(0, 1).contiguous().transpose(0, 1).reshape(48, 16)
    sliced = torch.cat([hidden, hidden], 1)[:, :16]
    for layout in (by_column, sequence_first, sliced):
        assert torch.equal(linear_logprob(layout, weight, targets, backend=backend)[0], base)
    assert torch.equal(linear_logprob(hidden, weight, targets.int(), backend=backend)[0], base)
    learner = by_column.clone().requires_grad_()
    linear_logprob(learner, weight, targets, backend=backend)[0].backward(torch.ones(1, device=DEVICE).expand(48))
    other = hidden.clone().requires_grad_()
    linear_logprob(other, weight, targets, backend=backend)[0].sum().backward()
    assert torch.equal(learner.grad, other.grad)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rows, masked", [(60, 0.2), (128, 0.0)])
def test_inputs_are_not_written(backend: str, rows: int, masked: float) -> None:
    inputs = head_case(rows, 16, 97, masked=masked)
    before = [value.clone() for value in inputs]
    hidden, weight = (value.requires_grad_() for value in inputs[:2])
    value, entropy = linear_logprob(hidden, weight, inputs[2], entropy=True, temperature=0.7, backend=backend)
    (value.sum() + entropy.sum()).backward()
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("vocab", [97, 1088, 90001])
def test_a_row_does_not_depend_on_its_neighbours(backend: str, vocab: int) -> None:
    if vocab > 2000 and backend != "torch" and DEVICE == "cpu":
        vocab = 2100
    hidden, weight, targets = head_case(300 if backend == "torch" else 40, 24, vocab, masked=0.0)
    call = partial(linear_logprob, entropy=True, backend=backend)
    whole = call(hidden, weight, targets)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    shuffled = call(hidden[order], weight, targets[order])
    alone = call(hidden[5:6], weight, targets[5:6])
    chunked = call(hidden, weight, targets, workspace_mib=0.01)
    with_masked = call(hidden, weight, torch.where(torch.arange(len(targets), device=DEVICE) % 3 == 0, targets, -1))
    for i in range(2):
        for found, expected in (
            (shuffled[i], whole[i][order]),
            (alone[i], whole[i][5:6]),
            (chunked[i], whole[i]),
            (with_masked[i][::3], whole[i][::3]),
        ):
            if backend == "triton_fused" and DEVICE == "cpu":  # NumPy's product of a tile depends on the row's place
                assert worst(found, expected) <= LOGPROB_BAR
            else:
                assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ("triton", "triton_fused"))
def test_a_row_does_not_depend_on_their_number_at_production_sizes(backend: str) -> None:
    if DEVICE != "cuda":
        pytest.skip("which product cuBLAS picks can only be seen on a CUDA device")
    hidden, weight, targets = head_case(5000, 3584, 19008, dtype=torch.bfloat16, masked=0.0)
    whole = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
    for count in (1, 64, 1000, 4097):
        part = linear_logprob(hidden[:count], weight, targets[:count], entropy=True, backend=backend)
        for found, expected in zip(part, whole, strict=True):
            assert torch.equal(found, expected[:count]), count


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_a_known_count_of_rows_changes_nothing(backend: str, masked: float) -> None:
    hidden, weight, targets = head_case(40, 16, 97, masked=masked)
    valid = int((targets >= 0).sum())
    base, _ = linear_logprob(hidden, weight, targets, backend=backend)
    assert torch.equal(linear_logprob(hidden, weight, targets, valid_count=valid, backend=backend)[0], base)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=f"valid_count=3: {valid} of 40 rows"):
            linear_logprob(hidden, weight, targets, valid_count=3, backend=backend)


@pytest.mark.parametrize("backend", ALL)
def test_bitwise_repeatable(backend: str) -> None:
    results = []
    for _ in range(2):
        hidden, weight, targets = head_case(140, 16, 1088)
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        value, entropy = linear_logprob(hidden, weight, targets, entropy=True, workspace_mib=SMALL, backend=backend)
        (value.sum() + entropy.sum()).backward()
        results.append((value.detach(), entropy.detach(), hidden.grad, weight.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_keep_exact_logprobs(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = head_case(130, 64, 1088, dtype=dtype, spread=6.0)
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    found = linear_logprob(*ours, targets, entropy=True, workspace_mib=SMALL, backend=backend)
    expected = oracle.logprob(*theirs, targets)
    assert worst(found[0], expected[0]) <= 1e-4 and (found[0] - expected[0]).abs().mean() <= 1e-5
    assert worst(found[1], expected[1]) <= 2e-4
    found[0].sum().backward()
    expected[0].sum().backward()
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.grad.dtype == dtype
        assert relative(mine.grad, right.grad) <= 2.8e-3


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_weight_gradient_goes_to_main_grad_once(backend: str) -> None:
    hidden, weight, targets = head_case(300, 16, 97)
    plain, held = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    held.main_grad = torch.ones_like(weight)
    held.grad_added_to_main_grad = False
    for head in (plain, held):
        linear_logprob(hidden, head, targets, workspace_mib=SMALL, backend=backend)[0].sum().backward()
    assert held.grad_added_to_main_grad is True
    assert relative(held.main_grad - 1, plain.grad) <= 1e-5
    assert held.grad is None or (held.grad == 0).all()


def test_fp64_is_computed_in_fp64() -> None:
    hidden, weight, targets = head_case(12, 8, 33, dtype=torch.float64)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    both = partial(linear_logprob, targets=targets, entropy=True, temperature=0.7, backend="torch")
    assert torch.autograd.gradcheck(lambda h, w: both(h, w), (hidden, weight))


def test_wrong_arguments_are_named() -> None:
    hidden, weight, targets = head_case(4, 8, 33)
    with pytest.raises(ValueError, match="backend='cuda'"):
        linear_logprob(hidden, weight, targets, backend="cuda")
    with pytest.raises(ValueError, match="temperature=0"):
        linear_logprob(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="targets"):
        linear_logprob(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="of one H"):
        linear_logprob(hidden, weight[:, :4], targets)
    with pytest.raises(TypeError, match="int32 or int64"):
        linear_logprob(hidden, weight, targets.float())
