"""Fingerprints add up over shards and notice every change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_mcore.rollout.fingerprint import add, fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), cut=st.integers(0, 9), seed=st.integers(0, 99))
def test_shards_sum_to_the_whole(dtype: torch.dtype, rows: int, columns: int, cut: int, seed: int) -> None:
    """Cut by rows or by columns, anywhere."""
    full = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    whole = fingerprint(full)
    at = min(cut, rows)
    assert add(fingerprint(full[:at]), fingerprint(full[at:], row=at)) == whole
    at = min(cut, columns)
    assert add(fingerprint(full[:, :at]), fingerprint(full[:, at:], column=at)) == whole


def test_every_change_shows() -> None:
    """One bit, two rows swapped, two columns swapped, two elements exchanged, a sign of zero."""
    full = torch.randn(17, 5, generator=torch.Generator().manual_seed(0))
    whole = fingerprint(full)
    for r in range(17):
        for c in range(5):
            changed = full.clone()
            changed.view(torch.int32)[r, c] ^= 1
            assert fingerprint(changed) != whole
    assert fingerprint(full[torch.randperm(17, generator=torch.Generator().manual_seed(1))]) != whole
    assert fingerprint(full[:, [1, 0, 2, 3, 4]]) != whole
    exchanged = full.clone()
    exchanged[2, 3], exchanged[5, 1] = full[5, 1], full[2, 3]
    assert fingerprint(exchanged) != whole
    assert fingerprint(torch.zeros(3)) != fingerprint(-torch.zeros(3))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor larger than a chunk has the same fingerprint; empty shards add nothing; vectors are columns."""
    import dppo_mcore.rollout.fingerprint as module

    full = torch.randn(64, 7)
    whole = fingerprint(full)
    monkeypatch.setattr(module, "_CHUNK", 16)
    assert fingerprint(full) == whole
    assert fingerprint(full[:0], row=64) == 0
    vector = torch.randn(10)
    assert add(fingerprint(vector[:4]), fingerprint(vector[4:], row=4)) == fingerprint(vector)
