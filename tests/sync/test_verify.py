"""What a failed verification says."""

from __future__ import annotations

import pytest

from dppo_mcore.rollout.base import SyncError
from dppo_mcore.sync.verify import compare, compare_logprobs, total


def test_the_first_difference_is_named() -> None:
    """In the plan's order; a missing tensor too."""
    compare({"a": 1, "b": 2}, {"b": 2, "a": 1, "more": 3}, "sglang")
    with pytest.raises(SyncError, match=r"b differs in engine sglang \(2 of 3 tensors\)"):
        compare({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}, "sglang")
    with pytest.raises(SyncError, match="a is missing from engine sglang"):
        compare({"a": 1}, {}, "sglang")


def test_sums_wrap() -> None:
    """As the fingerprints do."""
    assert total([{"a": 2**63 - 1}, {"a": 1, "b": 5}]) == {"a": -(2**63), "b": 5}


def test_log_probs_are_compared_token_by_token() -> None:
    """The worst one is named; NaN never passes; lengths must agree."""
    assert compare_logprobs([-1.0, -2.0], [-1.0, -2.25], 0.3) == 0.25
    with pytest.raises(SyncError, match="token 1 has -2.000000 in the trainer, -2.250000 in the engine"):
        compare_logprobs([-1.0, -2.0], [-1.0, -2.25], 0.2)
    with pytest.raises(SyncError, match="token 0 has nan"):
        compare_logprobs([float("nan")], [-1.0], 0.2)
    with pytest.raises(SyncError, match="scored 2 tokens, the engine 1"):
        compare_logprobs([-1.0, -2.0], [-1.0], 0.2)
