"""Packed attention with shared prompts: one mask idea for training, scoring and decoding.

A packed row holds segments. A segment is a prompt followed by its responses (none for a plain conversation); each
response sees the prompt and itself, not its siblings. The plan of a row rides in the argument in which Megatron
hands packed-sequence parameters through to every layer, so a layer that is recomputed in the backward pass sees
the plan of its own micro-batch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dppo_mcore.model.flex import block_mask, flex
from dppo_mcore.runtime import device
from dppo_mcore.runtime.errors import UserError

RESPONSE_CHUNK = 512
"""Responses up to so many tokens together share one call; the waste between siblings stays below the prompt's cost."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """Row ranges [start, end) of a prompt and of the responses that follow it, back to back."""

    prompt: Span
    responses: tuple[Span, ...] = ()


class Attend(Protocol):
    """What a layer's core attention asks of its plan: q [L, heads, D], k and v [L, kv heads, D] -> [L, heads, D]."""

    def attend(self, layer_number: int, q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scale: float) -> Tensor: ...


class PackedCoreAttention(MegatronModule):
    """Megatron's core attention, answered by the row's plan."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[L, 1, heads, D] queries and [L, 1, kv heads, D] keys and values -> [L, 1, heads * D]."""
        out_LHD = packed_seq_params.attend(
            self.layer_number, query.squeeze(1), key.squeeze(1), value.squeeze(1), self.scale
        )
        return out_LHD.reshape(query.shape[0], 1, -1)


def find_segments(segments_L: Tensor, branches_L: Tensor) -> tuple[Segment, ...]:
    """Read the spans off a row's segment and branch numbers; padding (-1) becomes a segment of its own."""
    pairs_2L = torch.stack([segments_L, branches_L]).cpu().to(torch.int64)
    changes = (pairs_2L[:, 1:] != pairs_2L[:, :-1]).any(0).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), pairs_2L.shape[1]]
    spans = [(a, b, *pairs_2L[:, a].tolist()) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    found: list[Segment] = []
    seen: set[int] = set()
    current: int | None = None
    for start, end, segment, branch in spans:
        if segment != current:
            if branch != 0 or segment in seen:
                raise ValueError(f"packed row: segment {segment} does not start with its prompt, or is split")
            seen.add(segment)
            current = segment
            found.append(Segment((start, end)))
        else:
            last = found[-1]
            if branch == 0:
                raise ValueError(f"packed row: segment {segment} has prompt tokens after a response")
            found[-1] = Segment(last.prompt, (*last.responses, (start, end)))
    return tuple(found)


def resolve_backend(name: str, shared: bool) -> str:
    """The backend that `auto` means for a row on this machine, or the named one where it can serve the row."""
    if name == "auto":
        if device.device().type != "cuda":
            return "sdpa"
        return "flash" if not shared and _flash_varlen() is not None else "flex"
    if name == "flash":
        if shared:
            raise UserError("--attention-backend flash knows no shared prompts: use auto or flex, or share_prompts off")
        if _flash_varlen() is None:
            raise UserError("--attention-backend flash needs CUDA and flash-attn, or a torch with varlen attention")
    return name


@dataclass
class AttentionPlan(PackedSeqParams):
    """How one packed row attends. Built once per micro-batch, used by every layer."""

    segments: tuple[Segment, ...] = ()
    backend: str = "sdpa"
    block_mask: Any = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def attend(self, layer_number: int, q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scale: float) -> Tensor:
        """Attention of one layer, [L, heads, D]."""
        if self.backend == "flex":
            return flex(q_LHD, k_LGD, v_LGD, self.block_mask, scale)
        if self.backend == "flash" and q_LHD.dtype is not torch.float32:
            return flash_varlen(q_LHD, k_LGD, v_LGD, self.cu_seqlens, self.max_seqlen, causal=True, scale=scale)
        return self._sdpa(q_LHD, k_LGD, v_LGD, scale)

    def _sdpa(self, q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scale: float) -> Tensor:
        """Each prompt once, causally; its responses against [prompt, own], a chunk of them per call."""
        sizes = [end - start for segment in self.segments for start, end in (segment.prompt, *segment.responses)]
        queries, keys, values = (list(x.split(sizes)) for x in (q_LHD, k_LGD, v_LGD))
        outputs: list[Tensor] = []
        at = 0
        for segment in self.segments:
            prompt_k, prompt_v = keys[at], values[at]
            outputs.append(_sdpa_call(queries[at], prompt_k, prompt_v, scale, None))
            at += 1
            for chunk in response_chunks(segment):
                stop = at + len(chunk)
                chunk_q = torch.cat(queries[at:stop])
                chunk_k = torch.cat([prompt_k, *keys[at:stop]])
                chunk_v = torch.cat([prompt_v, *values[at:stop]])
                outputs.append(_sdpa_call(chunk_q, chunk_k, chunk_v, scale, self._mask(segment.prompt, chunk, q_LHD)))
                at = stop
        return torch.cat(outputs)

    def _mask(self, prompt: Span, chunk: tuple[Span, ...], like: Tensor) -> Tensor:
        """Additive mask [n, prompt + n] of a chunk of responses, kept for all layers."""
        key = (prompt, chunk, like.dtype)
        if key not in self.masks:
            lengths = torch.tensor([end - start for start, end in chunk], device=like.device)
            owner = torch.repeat_interleave(lengths)
            own = (owner[:, None] == owner[None, :]).tril()
            seen = F.pad(own, (prompt[1] - prompt[0], 0), value=True)
            self.masks[key] = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
                ~seen, float("-inf")
            )
        return self.masks[key]


def plan_attention(segments_L: Tensor, branches_L: Tensor, backend: str = "auto") -> AttentionPlan:
    """The plan of one packed row from its segment and branch numbers [L]."""
    segments = find_segments(segments_L, branches_L)
    # A prompt with one response is plain causal attention.
    name = resolve_backend(backend, shared=any(len(segment.responses) > 1 for segment in segments))
    plan = AttentionPlan(qkv_format="sbhd", segments=segments, backend=name)
    where = device.device()
    if name == "flex":
        plan.block_mask = block_mask(segments, segments_L.to(where), branches_L.to(where))
    elif name == "flash":
        bounds = [0, *((segment.prompt, *segment.responses)[-1][1] for segment in segments)]
        plan.cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=where)
        plan.max_seqlen = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    return plan


def response_chunks(segment: Segment) -> list[tuple[Span, ...]]:
    """Consecutive responses together up to `RESPONSE_CHUNK` tokens, at least one a chunk."""
    chunks: list[tuple[Span, ...]] = []
    chunk: list[Span] = []
    for span in segment.responses:
        if chunk and span[1] - chunk[0][0] > RESPONSE_CHUNK:
            chunks.append(tuple(chunk))
            chunk = []
        chunk.append(span)
    return [*chunks, tuple(chunk)] if chunk else chunks


def _sdpa_call(q_NHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_NHD, k_KGD, v_KGD))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.squeeze(0).transpose(0, 1)


@lru_cache(maxsize=1)
def _flash_varlen() -> Any:
    """A varlen flash attention `f(q, k, v, cu_seqlens, max_seqlen, causal, scale)`, or None where there is none."""
    if device.device().type != "cuda":
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        flash_attn_varlen_func = None
    if flash_attn_varlen_func is not None:
        return lambda q, k, v, cu, longest, causal, scale: flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=causal
        )
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        return None
    return lambda q, k, v, cu, longest, causal, scale: varlen_attn(
        q, k, v, cu, cu, longest, longest, scale=scale, window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def flash_varlen(
    q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, causal: bool, scale: float
) -> Tensor:
    """Flash attention over spans cu_seqlens[i]:cu_seqlens[i+1], [L, heads, D]."""
    return _flash_varlen()(q_LHD, k_LGD, v_LGD, cu_seqlens, max_seqlen, causal, scale)


def has_flash_varlen() -> bool:
    """Whether this machine has a varlen flash attention."""
    return _flash_varlen() is not None
