"""linear_policy_loss against the two ops it fuses, and against fp64."""

from __future__ import annotations

import pytest
import torch
from dppo_kernels import linear_logprob, linear_policy_loss, policy_loss
from torch import Tensor

from tests.kernels import oracle
from tests.kernels.oracle import BACKENDS, DEVICE, head_case, relative

SMALL = 0.25
BOUNDS = [0, 30, 30, 33, 200, 230]


def case(rows: int = 230, width: int = 16, vocab: int = 123, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A head and its policy columns, the old log-probs near the present ones."""
    hidden, weight, targets = head_case(rows, width, vocab, dtype=dtype)
    source = torch.Generator().manual_seed(2)

    def noise(size: float) -> Tensor:
        return (size * torch.randn(rows, generator=source)).to(DEVICE)

    present = oracle.logprob(hidden, weight, targets, 0.9)[0].float()
    old = present + noise(0.3)
    mask = (torch.rand(rows, generator=source) < 0.5).to(DEVICE)
    return dict(
        hidden=hidden, weight=weight, targets=targets, old=old, advantages=noise(1.0), mask=mask,
        ref=present + noise(0.2), rollout=old + noise(0.1),
    )  # fmt: skip


def fused(data: dict[str, Tensor], backend: str, upstream: float = 1.0, **options):
    """Loss, gradients and metrics."""
    hidden, weight = (data[name].clone().requires_grad_() for name in ("hidden", "weight"))
    loss, metrics = linear_policy_loss(
        hidden, weight, data["targets"], data["old"], data["advantages"], data["mask"], temperature=0.9,
        ref_logprobs=data["ref"], rollout_logprobs=data["rollout"], cu_seqlens=torch.tensor(BOUNDS, device=DEVICE),
        kl_coef=0.1, tis_cap=1.1, backend=backend, **options,
    )  # fmt: skip
    (loss * upstream).backward()
    for name, value in (("hidden", hidden), ("weight", weight)):
        assert torch.equal(value.nan_to_num(), data[name].nan_to_num())
    return loss.detach(), hidden.grad, weight.grad, metrics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_against_the_oracle(backend: str, level: str, aggregation: str) -> None:
    data = case()
    options = dict(level=level, aggregation=aggregation)
    loss, grad_hidden, grad_weight, metrics = fused(data, backend, -2.0, workspace_mib=SMALL, **options)
    hidden, weight = (data[name].double().requires_grad_() for name in ("hidden", "weight"))
    logps, entropy = oracle.logprob(hidden, weight, data["targets"], 0.9)
    valid = data["mask"] & (data["targets"] >= 0)
    right = oracle.policy(
        logps, data["old"], data["advantages"], valid, data["ref"], data["rollout"],
        kl_coef=0.1, tis_cap=1.1, bounds=BOUNDS, **options,
    )  # fmt: skip
    (right * -2.0).backward()
    assert loss.item() == pytest.approx(right.item(), abs=2e-6)
    assert relative(grad_hidden, hidden.grad) <= 5e-6 and relative(grad_weight, weight.grad) <= 5e-6
    assert metrics["entropy"].sum.item() == pytest.approx(float(entropy[valid].sum()), rel=2e-6)
    assert metrics["entropy"].count == valid.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_same_as_the_composition(backend: str, level: str) -> None:
    data = case()
    options = dict(level=level, aggregation="seq-mean-token-sum", normalizer=3.0, dual_clip=2.0)
    loss, grad_hidden, grad_weight, metrics = fused(data, backend, **options)
    hidden, weight = (data[name].clone().requires_grad_() for name in ("hidden", "weight"))
    logps, _ = linear_logprob(hidden, weight, data["targets"], temperature=0.9, backend=backend)
    apart, parts = policy_loss(
        logps, data["old"], data["advantages"], data["mask"] & (data["targets"] >= 0), ref_logprobs=data["ref"],
        rollout_logprobs=data["rollout"], cu_seqlens=torch.tensor(BOUNDS, device=DEVICE), kl_coef=0.1, tis_cap=1.1,
        backend=backend, **options,
    )  # fmt: skip
    apart.backward()
    assert loss.item() == pytest.approx(apart.item(), rel=2e-6)
    assert relative(grad_hidden, hidden.grad) <= 2e-6 and relative(grad_weight, weight.grad) <= 2e-6
    for name, (total, count) in parts.items():
        assert metrics[name].sum.item() == pytest.approx(total.item(), rel=1e-5, abs=1e-5)
        assert metrics[name].count == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_longer_than_a_chunk(backend: str) -> None:
    data = case(rows=400)
    data["mask"][:] = True
    data["targets"].clamp_(min=0)
    bounds = torch.tensor([0, 20, 380, 400], device=DEVICE)
    results = []
    for workspace in (64, 0.01):
        hidden, weight = (data[name].clone().requires_grad_() for name in ("hidden", "weight"))
        loss, _ = linear_policy_loss(
            hidden, weight, *(data[name] for name in ("targets", "old", "advantages", "mask")),
            level="sequence", cu_seqlens=bounds, workspace_mib=workspace, backend=backend,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for whole, chunked in zip(*results, strict=True):
        assert relative(chunked, whole) <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_leave_no_trace_whatever_they_hold(backend: str) -> None:
    clean = case()
    valid = clean["mask"] & (clean["targets"] >= 0)
    poisoned = {name: values.clone() for name, values in clean.items()}
    poisoned["hidden"][~valid] = float("nan")
    poisoned["targets"][~clean["mask"]] = 10**6
    for name in ("old", "advantages", "ref", "rollout"):
        poisoned[name][~valid] = float("inf")
    for first, second in zip(fused(clean, backend)[:3], fused(poisoned, backend)[:3], strict=True):
        assert torch.equal(first, second)
    assert (fused(poisoned, backend)[1][~valid] == 0).all()
    nothing = clean | dict(mask=torch.zeros_like(clean["mask"]))
    loss, grad_hidden, grad_weight, metrics = fused(nothing, backend)
    assert loss == 0 and (grad_hidden == 0).all() and (grad_weight == 0).all()
    assert metrics["entropy"] == (0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", [None, 0.5])
def test_weight_gradient_goes_to_main_grad_once(backend: str, upstream: float | None) -> None:
    data = case()
    _, grad_hidden, grad_weight, _ = fused(data, backend, 0.5)
    hidden, weight = (data[name].clone().requires_grad_() for name in ("hidden", "weight"))
    weight.main_grad = torch.ones_like(weight)
    weight.grad_added_to_main_grad = False
    for micro_batch in (1, 2):
        hidden.grad = None
        loss, _ = linear_policy_loss(
            hidden, weight, *(data[name] for name in ("targets", "old", "advantages", "mask")), temperature=0.9,
            ref_logprobs=data["ref"], rollout_logprobs=data["rollout"], kl_coef=0.1, tis_cap=1.1,
            workspace_mib=SMALL, upstream=upstream, backend=backend,
        )  # fmt: skip
        (loss * 0.5).backward()
        assert weight.grad_added_to_main_grad is True
        assert relative(weight.main_grad - 1, micro_batch * grad_weight) <= 2e-4
        assert relative(hidden.grad, grad_hidden) <= 2e-6
        assert weight.grad is None or (weight.grad == 0).all()


def test_a_broken_promise_about_the_upstream_gradient_is_an_error() -> None:
    if DEVICE == "cuda":
        return  # there it ends the process
    data = case()
    hidden = data["hidden"].requires_grad_()
    rest = [data[name] for name in ("weight", "targets", "old", "advantages", "mask")]
    loss, _ = linear_policy_loss(hidden, *rest, upstream=1.0)
    with pytest.raises(RuntimeError, match="upstream=1.0 as promised"):
        (loss * 0.5).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_gradients_and_a_second_walk(backend: str) -> None:
    data = case()
    _, grad_hidden, grad_weight, _ = fused(data, backend)
    rest = [data[name] for name in ("targets", "old", "advantages", "mask")]
    options = dict(
        temperature=0.9, ref_logprobs=data["ref"], rollout_logprobs=data["rollout"], kl_coef=0.1, tis_cap=1.1,
        backend=backend,
    )  # fmt: skip
    hidden = data["hidden"].clone().requires_grad_()
    loss, _ = linear_policy_loss(hidden, data["weight"], *rest, **options)
    loss.backward(retain_graph=True)
    assert torch.equal(hidden.grad, grad_hidden)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    weight = data["weight"].clone().requires_grad_()
    linear_policy_loss(data["hidden"], weight, *rest, **options)[0].backward()
    assert torch.equal(weight.grad, grad_weight)
    with torch.no_grad():
        assert not linear_policy_loss(data["hidden"], weight, *rest, **options)[0].requires_grad
    loss, _ = linear_policy_loss(hidden, data["weight"], *rest, **options)
    loss /= 4  # a training loop may divide in place


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable_and_inputs_unchanged(backend: str) -> None:
    data = case()
    before = {name: values.clone() for name, values in data.items()}
    for first, second in zip(*(fused(data, backend, workspace_mib=SMALL)[:3] for _ in range(2)), strict=True):
        assert torch.equal(first, second)
    assert all(torch.equal(data[name], before[name]) for name in data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_ratio_is_exactly_one(backend: str) -> None:
    data = case()
    old, _ = linear_logprob(data["hidden"], data["weight"], data["targets"], backend=backend)
    rest = [data[name] for name in ("advantages", "mask")]
    _, metrics = linear_policy_loss(data["hidden"], data["weight"], data["targets"], old, *rest, backend=backend)
    assert metrics["ratio"].sum == metrics["ratio"].count and metrics["approx_kl"].sum == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_weights(backend: str) -> None:
    data = case(rows=300, width=64, vocab=1088, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 300], device=DEVICE)
    hidden, weight = (data[name].clone().requires_grad_() for name in ("hidden", "weight"))
    weight.main_grad = torch.zeros(weight.shape, device=DEVICE)
    rest = [data[name] for name in ("targets", "old", "advantages", "mask")]
    loss, _ = linear_policy_loss(hidden, weight, *rest, cu_seqlens=bounds, temperature=0.9, backend=backend)
    loss.backward()
    wide = [data[name].double().requires_grad_() for name in ("hidden", "weight")]
    logps, _ = oracle.logprob(*wide, data["targets"], 0.9)
    right = oracle.policy(logps, data["old"], data["advantages"], data["mask"] & (data["targets"] >= 0))
    right.backward()
    assert loss.item() == pytest.approx(right.item(), abs=1e-5)
    assert relative(hidden.grad, wide[0].grad) <= 2.8e-3
    assert relative(weight.main_grad, wide[1].grad) <= 2.2e-3
    plain = data["weight"].clone().requires_grad_()
    loss, _ = linear_policy_loss(data["hidden"], plain, *rest, cu_seqlens=bounds, temperature=0.9, backend=backend)
    (loss * -2.0).backward()
    assert plain.grad.dtype == torch.bfloat16 and relative(plain.grad, -2.0 * wide[1].grad) <= 2.8e-3
