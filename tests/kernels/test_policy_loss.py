"""policy_loss against a looped fp64 oracle, and its rules at the edges."""

from __future__ import annotations

import itertools

import pytest
import torch
from dppo_kernels import policy_loss
from torch import Tensor

from tests.kernels import oracle
from tests.kernels.oracle import BACKENDS, DEVICE, relative

BOUNDS = [0, 300, 300, 1450, 1451, 1800]


def columns(count: int = 1800, seed: int = 0) -> dict[str, Tensor]:
    """Log-probs of the policy, old, reference and rollout; advantages; a mask with a wholly masked sequence."""
    source = torch.Generator().manual_seed(seed)

    def noise(size: float) -> Tensor:
        return size * torch.randn(count, generator=source)

    new = -noise(1.0).abs()
    old = new + noise(0.3)
    mask = torch.rand(count, generator=source) < 0.6
    mask[1450:1451] = False
    found = dict(new=new, old=old, advantages=noise(1.0), mask=mask, ref=new + noise(0.2), rollout=old + noise(0.1))
    return {name: values.to(DEVICE) for name, values in found.items()}


def ours(data: dict[str, Tensor], backend: str, upstream: float = 1.0, **options):
    """Loss, gradient and metrics."""
    new = data["new"].clone().requires_grad_()
    loss, metrics = policy_loss(
        new, data["old"], data["advantages"], data["mask"], ref_logprobs=data.get("ref"),
        rollout_logprobs=data.get("rollout"), cu_seqlens=torch.tensor(BOUNDS, device=DEVICE),
        backend=backend, **options,
    )  # fmt: skip
    (loss * upstream).backward()
    return loss.detach(), new.grad, metrics


def single(backend: str, new: float, old: float, advantage: float, **options) -> tuple[float, float]:
    """Loss and gradient of one token."""
    logprob = torch.tensor([new], device=DEVICE, requires_grad=True)
    rest = [torch.tensor([value], device=DEVICE) for value in (old, advantage, 1.0)]
    loss, _ = policy_loss(logprob, *rest, backend=backend, **options)
    loss.backward()
    return loss.item(), logprob.grad.item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"])
def test_value_and_gradient(backend: str, level: str, aggregation: str) -> None:
    data = columns()
    for dual_clip, kl, tis_cap, normalizer in itertools.product((None, 1.5), ("k1", "k3"), (None, 1.05), (None, 77.0)):
        if aggregation == "constant" and normalizer is None:
            continue
        options = dict(
            dual_clip=dual_clip, kl=kl, kl_coef=0.3, tis_cap=tis_cap, normalizer=normalizer,
            level=level, aggregation=aggregation,
        )  # fmt: skip
        loss, grad, _ = ours(data, backend, upstream=-2.5, **options)
        new = data["new"].double().requires_grad_()
        right = oracle.policy(
            new, data["old"], data["advantages"], data["mask"], data["ref"], data["rollout"], bounds=BOUNDS, **options
        )
        (right * -2.5).backward()
        assert abs(loss - right) <= 1e-6 * max(1.0, abs(right))
        assert relative(grad, new.grad) <= 1e-6
        assert (grad[~data["mask"]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_k2_and_near_zero_k3_keep_their_digits(backend: str) -> None:
    for kind, delta in (("k2", 1e-3), ("k3", 1e-3), ("k3", 1e-4), ("k3", 0.6), ("k3", -5.0)):
        new = torch.tensor([0.0], device=DEVICE, requires_grad=True)
        ref = torch.tensor([delta], device=DEVICE)
        zero, one = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
        loss, _ = policy_loss(new, zero, zero, one, ref_logprobs=ref, kl=kind, kl_coef=1.0, backend=backend)
        loss.backward()
        d = ref.double()
        right, slope = (d * d / 2, -d) if kind == "k2" else (torch.expm1(d) - d, -torch.expm1(d))
        assert abs(loss.item() - right.item()) <= 1e-6 * right.item() + (1e-15 if abs(delta) > 1e-3 else 1e-13)
        assert abs(new.grad.item() - slope.item()) <= 1e-6 * abs(slope.item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_huge_log_ratios_stay_finite(backend: str, level: str) -> None:
    options = dict(level=level, cu_seqlens=torch.tensor([0, 1], device=DEVICE))
    assert single(backend, 200.0, 0.0, 1.0, **options) == (pytest.approx(-1.28), 0.0)
    assert single(backend, 200.0, 0.0, 0.0, **options) == (0.0, 0.0)
    loss, grad = single(backend, 200.0, 0.0, -1.0, **options)
    assert loss == pytest.approx(4.851652e8, rel=1e-5) and grad == 0.0
    loss, grad = single(backend, -200.0, 0.0, 1.0, **options)
    assert abs(loss) < 1e-8 and grad == 0.0
    assert single(backend, -200.0, 0.0, -1.0, **options) == (pytest.approx(0.8), 0.0)
    assert single(backend, float("-inf"), 0.0, -1.0, **options) == (pytest.approx(0.8), 0.0)
    loss, grad = single(backend, 200.0, 0.0, -1.0, dual_clip=3.0, **options)
    assert (loss, grad) == (3.0, 0.0)
    assert single(backend, 20.0, 0.0, -1.0, **options)[1] > 1e8
    for distance in (100.0, -100.0):
        ref = torch.tensor([distance], device=DEVICE)
        for kind in ("k1", "k2", "k3"):
            loss, grad = single(backend, 0.0, 0.0, 1.0, ref_logprobs=ref, kl=kind, kl_coef=0.1, **options)
            assert abs(loss) < 1e9 and grad == pytest.approx(-1.0)
    rollout = torch.tensor([-300.0], device=DEVICE)
    assert single(backend, 0.0, 0.0, 1.0, rollout_logprobs=rollout, tis_cap=2.0, **options)[0] == pytest.approx(-2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_an_edge_the_unclipped_branch_wins(backend: str) -> None:
    for advantage in (1.0, -1.0, 0.0):
        assert single(backend, -0.7, -0.7, advantage, clip_low=0.0, clip_high=0.0)[1] == -advantage
    assert single(backend, 0.0, 0.0, 1.0)[1] == -1.0
    assert single(backend, 0.0, 0.0, -1.0, dual_clip=1.0000001)[1] == pytest.approx(1.0)
    assert single(backend, 0.3, 0.0, 1.0)[1] == 0.0
    assert single(backend, 0.3, 0.0, -1.0)[1] > 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_tokens_leave_no_trace(backend: str, level: str) -> None:
    clean = columns()
    poisoned = {name: values.clone() for name, values in clean.items()}
    for name in ("new", "old", "advantages", "ref", "rollout"):
        poisoned[name][~clean["mask"]] = float("nan")
    options = dict(level=level, aggregation="seq-mean-token-mean", tis_cap=1.2, kl_coef=0.1)
    first, second = (ours(data, backend, **options) for data in (clean, poisoned))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for name, metric in first[2].items():
        assert torch.equal(metric.sum, second[2][name].sum) and torch.equal(metric.count, second[2][name].count)
    nothing = clean | dict(mask=torch.zeros_like(clean["mask"]))
    loss, grad, metrics = ours(nothing, backend, **options)
    assert loss == 0 and (grad == 0).all()
    assert all(metric.sum == 0 and metric.count == 0 for metric in metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_that_counts_is_not_hidden(backend: str) -> None:
    data = columns()
    data["new"][int(data["mask"].nonzero()[0])] = float("nan")
    assert ours(data, backend)[0].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"])
def test_micro_batches_add_up_to_the_whole(backend: str, aggregation: str) -> None:
    data = columns()
    sequences = sum(bool(data["mask"][a:b].any()) for a, b in zip(BOUNDS[:-1], BOUNDS[1:], strict=True))
    counted = {"token-mean": int(data["mask"].sum()), "constant": 512}.get(aggregation, sequences)
    options = dict(aggregation=aggregation, backend=backend, level="sequence")
    total, grads = 0.0, []
    for normalizer in (float(counted), torch.tensor(counted, device=DEVICE)):
        total, grads = 0.0, []
        for cut in ([0, 300, 300], [300, 1450, 1451, 1800]):
            part = slice(cut[0], cut[-1])
            new = data["new"][part].clone().requires_grad_()
            loss, _ = policy_loss(
                new, data["old"][part], data["advantages"][part], data["mask"][part],
                cu_seqlens=torch.tensor(cut, device=DEVICE) - cut[0], normalizer=normalizer, **options,
            )  # fmt: skip
            loss.backward()
            total, grads = total + loss.item(), [*grads, new.grad]
        assert total == pytest.approx(
            ours(data, backend, aggregation=aggregation, level="sequence", normalizer=float(counted))[0].item(),
            rel=2e-6,
        )
    new = data["new"].double().requires_grad_()
    right = oracle.policy(
        new, data["old"], data["advantages"], data["mask"],
        bounds=BOUNDS, level="sequence", aggregation=aggregation, normalizer=counted,
    )  # fmt: skip
    right.backward()
    assert total == pytest.approx(right.item(), rel=2e-6)
    assert relative(torch.cat(grads), new.grad) <= 1e-6
    if aggregation != "constant":
        default = ours({k: v for k, v in data.items() if k not in ("ref", "rollout")}, backend, level="sequence",
                       aggregation=aggregation)  # fmt: skip
        assert default[0].item() == pytest.approx(right.item(), rel=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_are_sums_with_counts(backend: str) -> None:
    data = columns()
    _, _, metrics = ours(data, backend, tis_cap=1.05, kl="k1")
    mask = data["mask"]
    ratio = (data["new"] - data["old"]).double().exp()[mask]
    advantages = data["advantages"][mask]
    right = dict(
        ratio=ratio.sum(),
        approx_kl=(ratio - 1 - ratio.log()).sum(),
        clip_fraction_low=((ratio < 0.8) & (advantages < 0)).sum(),
        clip_fraction_high=((ratio > 1.28) & (advantages > 0)).sum(),
        kl_ref=(data["new"] - data["ref"]).double()[mask].sum(),
        tis_weight=(data["old"] - data["rollout"]).double().exp().clamp(max=1.05)[mask].sum(),
    )
    assert set(metrics) == set(right)
    for name, (total, count) in metrics.items():
        assert count == mask.sum()
        assert not total.requires_grad
        assert total.item() == pytest.approx(float(right[name]), rel=2e-6)
    plain = {name: data[name] for name in ("new", "old", "advantages", "mask")}
    assert set(ours(plain, backend)[2]) == {"ratio", "approx_kl", "clip_fraction_low", "clip_fraction_high"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_bitwise_repeatable_and_inputs_unchanged(backend: str, level: str) -> None:
    data = columns()
    before = {name: values.clone() for name, values in data.items()}
    first, second = (ours(data, backend, level=level, tis_cap=1.1, kl_coef=0.2) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(data[name], before[name]) for name in data)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 1023, 1025])
def test_any_number_of_tokens(backend: str, count: int) -> None:
    data = {name: values[:count] for name, values in columns().items()}
    new = data["new"].clone().requires_grad_()
    loss, _ = policy_loss(new, data["old"], data["advantages"], data["mask"].float(), backend=backend)
    loss.backward()
    other = data["new"].double().requires_grad_()
    right = oracle.policy(other, data["old"], data["advantages"], data["mask"])
    assert loss.item() == pytest.approx(float(right), abs=1e-6)
    if count and data["mask"].any():
        right.backward()
        assert relative(new.grad, other.grad) <= 1e-6
    scaled = loss.clone()
    scaled /= 4  # a training loop may divide in place


def test_wrong_arguments_are_named() -> None:
    data = columns()
    four = [data[name] for name in ("new", "old", "advantages", "mask")]
    for options, match in (
        (dict(kl="k4"), "kl='k4'"),
        (dict(level="word"), "level='word'"),
        (dict(aggregation="mean"), "aggregation='mean'"),
        (dict(dual_clip=0.5), "dual_clip=0.5"),
        (dict(aggregation="constant"), "normalizer=None"),
        (dict(level="sequence"), "cu_seqlens=None"),
        (dict(ref_logprobs=data["ref"][:5]), "ref_logprobs"),
    ):
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=match):
                policy_loss(*four, backend=backend, **options)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="cu_seqlens runs 0..5"):
            policy_loss(*four, level="sequence", cu_seqlens=torch.tensor([0, 5]))
