"""The vocabulary spread over gloo ranks: same values as on one, bit-identical on all."""

from __future__ import annotations

import pytest
import torch
from dppo_kernels import linear_policy_loss

from tests.kernels import oracle, parallel_cases
from tests.kernels.oracle import BACKENDS, head_case, relative, worst
from tests.support.rank_pool import RankPool

SHARDS = ([61, 61], [30, 92], [31, 31, 31, 31], [0, 100, 1, 21], [100, 22, 40, 40])
VOCAB = 122


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", SHARDS, ids=str)
@pytest.mark.parametrize("told", [True, False])
def test_logprobs(pool2: RankPool, pool4: RankPool, backend: str, lengths: list[int], told: bool) -> None:
    check_logprobs(pool2 if len(lengths) == 2 else pool4, lengths, told, backend)


def test_a_group_that_is_not_the_world(pool4: RankPool) -> None:
    check_logprobs(pool4, [50, 72], True, "torch")


def check_logprobs(pool: RankPool, lengths: list[int], told: bool, backend: str) -> None:
    """All ranks against fp64 on one."""
    ranks = pool.run(parallel_cases.logprobs, lengths, VOCAB, told, backend)
    hidden, weight, targets = head_case(70, 16, VOCAB)
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    value, entropy = oracle.logprob(*wide, targets, 0.8)
    (value * torch.linspace(-1, 2, 70) + 0.3 * entropy).sum().backward()
    for rank, found in enumerate(ranks):
        for name in ("value", "entropy", "hidden"):
            assert torch.equal(found[name], ranks[0][name])
        first = sum(lengths[: rank % len(lengths)])
        rows = wide[1].grad[first : first + lengths[rank % len(lengths)]]
        assert worst(found["weight"][: len(rows)], rows) <= 2e-5
        assert (found["weight"][len(rows) :] == 0).all()
    assert worst(ranks[0]["value"], value) <= 5e-6 and worst(ranks[0]["entropy"], entropy) <= 5e-6
    assert relative(ranks[0]["hidden"], wide[0].grad) <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_loss(pool2: RankPool, pool4: RankPool, backend: str, level: str) -> None:
    for pool, lengths in ((pool2, [60, 62]), (pool4, [1, 60, 61, 10])):
        check_policy(pool, lengths, VOCAB, level, backend)


@pytest.mark.parametrize("lengths", [[128, 128], [30, 110]], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_unequal_columns_make_no_unequal_chunks(pool2: RankPool, lengths: list[int], level: str) -> None:
    """By its own columns one rank would take the 228 rows that count in chunks of 128, the other all at once."""
    check_policy(pool2, lengths, 140, level, "torch", rows=400, workspace_mib=0.2)


def check_policy(
    pool: RankPool, lengths: list[int], vocab: int, level: str, backend: str, rows: int = 200, **more: float
) -> None:
    """All ranks against one."""
    ranks = pool.run(parallel_cases.policy, lengths, vocab, level, False, backend, rows, timeout_s=60.0, **more)
    hidden, weight, targets = head_case(rows, 16, vocab)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    source = torch.Generator().manual_seed(4)
    old = -4 + torch.randn(rows, generator=source)
    mask = torch.rand(rows, generator=source) < 0.7
    loss, _ = linear_policy_loss(
        hidden, weight, targets, old, torch.randn(rows, generator=source), mask,
        level=level, cu_seqlens=torch.tensor([0, 3 * rows // 4, rows]), backend="torch",
    )  # fmt: skip
    loss.backward()
    for found in ranks:
        assert torch.equal(found["loss"], ranks[0]["loss"]) and torch.equal(found["hidden"], ranks[0]["hidden"])
    assert ranks[0]["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    assert relative(ranks[0]["hidden"], hidden.grad) <= 2e-6
    spread = torch.cat([found["weight"] for found in ranks])[:vocab]
    assert relative(spread, weight.grad) <= 2e-6


def test_without_a_valid_row_every_collective_is_still_issued(pool2: RankPool) -> None:
    for found in pool2.run(parallel_cases.policy, [61, 61], VOCAB, "token", True, "torch"):
        assert found["issued"] == 1
        assert found["loss"] == 0 and (found["hidden"] == 0).all() and (found["weight"] == 0).all()


def test_a_target_no_rank_owns_is_an_error_on_all(pool2: RankPool) -> None:
    for message in pool2.run(parallel_cases.outside, [61, 64], VOCAB):
        assert "targets[2] = 122 lies outside the vocabulary of 122 ids" in message
