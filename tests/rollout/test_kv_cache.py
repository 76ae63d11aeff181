"""Decoding attention by itself: as exact as the trainer's, and no copy of the cache for each token."""

from __future__ import annotations

import torch

from dppo_mcore.rollout.kv_cache import CohortCache, RecordingPlan

KV, SHARE, DIM, TOKENS = 2, 3, 64, 12


def cohort(dtype: torch.dtype, prefixes: list[tuple[int, int]]) -> tuple[CohortCache, torch.Tensor, torch.Tensor]:
    """One prompt of four tokens and its answers, with keys large enough that scores reach some forties."""
    torch.manual_seed(0)
    k_LGD, v_LGD = (torch.randn(TOKENS, KV, DIM).mul(size).to(dtype) for size in (5.0, 1.0))
    recorded = RecordingPlan(keys={1: k_LGD}, values={1: v_LGD})
    return CohortCache(recorded, [(0, 4)], prefixes, [0] * len(prefixes)), k_LGD, v_LGD


def test_scores_are_not_rounded_to_16_bits() -> None:
    """The same bf16 keys attended to in double precision: only the weights and the result are rounded."""
    cache, k_LGD, v_LGD = cohort(torch.bfloat16, [(4, 12)])
    q_BHD, k_BGD, v_BGD = (torch.randn(1, n, DIM).mul(4).to(torch.bfloat16) for n in (KV * SHARE, KV, KV))
    cache.reserve(8)
    got = cache.attend(1, q_BHD, k_BGD, v_BGD, DIM**-0.5).double().view(KV, SHARE, DIM)
    keys, values = (torch.cat(pair).double() for pair in ((k_LGD, k_BGD), (v_LGD, v_BGD)))
    scores = torch.einsum("grd,lgd->grl", q_BHD.double().view(KV, SHARE, DIM), keys) * DIM**-0.5
    expected = torch.einsum("grl,lgd->grd", scores.softmax(-1), values)
    assert scores.abs().max() > 32
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01)


def test_room_is_made_by_doubling_behind_the_longest_prefix() -> None:
    """An answer without a prefix beside one with eight tokens has its whole budget, in two copies."""
    cache, _, _ = cohort(torch.float32, [(4, 12), (12, 12)])
    sizes = []
    for _ in range(40):
        cache.reserve(40)
        cache.advance()
        sizes.append(cache._own[1][0].shape[2])
    assert sizes == [32] * 24 + [48] * 16
