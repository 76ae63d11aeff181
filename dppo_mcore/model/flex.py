"""FlexAttention over packed rows: the block mask straight from the row's spans, without looking at all pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 128

Span = tuple[int, int]


def visible_pairs(prompt: Span, responses: Sequence[Span]) -> Iterator[tuple[Span, Span]]:
    """(query span, key span) of a segment; a span looks at itself causally and at others wholly."""
    yield prompt, prompt
    for response in responses:
        yield response, prompt
        yield response, response


def block_tables(segments: Sequence[Any], length: int) -> tuple[Tensor, Tensor]:
    """Blocks [blocks, blocks] with any visible pair, and those (a subset) known to be visible throughout."""
    count = -(-length // BLOCK)
    touched = torch.zeros(count, count, dtype=torch.bool)
    full = torch.zeros(count, count, dtype=torch.bool)
    place = torch.arange(count)
    for segment in segments:
        for queries, keys in visible_pairs(segment.prompt, segment.responses):
            rows, columns = _touched(queries), _touched(keys)
            inner_rows, inner_columns = _inside(queries), _inside(keys)
            if queries == keys:
                lower = place[rows, None] >= place[None, columns]
                touched[rows, columns] |= lower
                full[inner_rows, inner_columns] |= place[inner_rows, None] > place[None, inner_columns]
            else:
                touched[rows, columns] = True
                full[inner_rows, inner_columns] = True
    return touched, full


def _touched(span: Span) -> slice:
    return slice(span[0] // BLOCK, -(-span[1] // BLOCK))


def _inside(span: Span) -> slice:
    start = -(-span[0] // BLOCK)
    return slice(start, max(start, span[1] // BLOCK))


def block_mask(segments: Sequence[Any], segments_L: Tensor, branches_L: Tensor) -> Any:
    """FlexAttention's mask of a row whose segment and branch numbers lie on the device."""
    from torch.nn.attention.flex_attention import BlockMask

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (segments_L[q] == segments_L[k]) & (k <= q)
        return same & ((branches_L[k] == 0) | (branches_L[k] == branches_L[q]))

    length = segments_L.numel()
    touched, full = block_tables(segments, length)
    partial_counts, partial_order = _ordered(touched & ~full, segments_L.device)
    full_counts, full_order = _ordered(full, segments_L.device)
    return BlockMask.from_kv_blocks(
        partial_counts, partial_order, full_counts, full_order,
        BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length),
    )  # fmt: skip


def _ordered(table: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per block row: how many key blocks, and their numbers first in ascending order; [1, 1, ...] int32."""
    counts = table.sum(1, dtype=torch.int32)
    order = torch.argsort(~table, dim=1, stable=True).to(torch.int32)
    return counts[None, None].to(device), order[None, None].contiguous().to(device)


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    """FlexAttention, compiled once for rows of any length."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, mask: Any, scale: float) -> Tensor:
    """Attention of a packed row, [L, heads, D]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_LHD, k_LGD, v_LGD))
    out = compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)
