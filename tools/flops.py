"""Counts the floating-point operations a call really issues, CPU flash attention included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _pairs(query: Any, key: Any, causal: bool) -> int:
    """Query-key pairs times head dimension; under a causal mask only those the kernel visits."""
    batch, heads, queries, dim = query
    keys = key[2]
    visited = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    return batch * heads * visited * dim


def _attention(query: Any, key: Any, _value: Any, _dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return 4 * _pairs(query, key, is_causal)


def _attention_backward(
    _grad: Any, query: Any, key: Any, _value: Any, _out: Any, _lse: Any, _dropout: float, is_causal: bool, **_: Any
) -> int:
    return 10 * _pairs(query, key, is_causal)


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of one call, matrix products and attention."""
    counter = FlopCounterMode(display=False, custom_mapping={_FORWARD: _attention, _BACKWARD: _attention_backward})
    with counter:
        call()
    return counter.get_total_flops()
