"""The vision tower: patches of independent frames to media embeddings.

Every block attends within windows or within a frame, never across frames, so frames can be encoded anywhere.
Parameter names are the checkpoint's, after `visual.`. Parts are made in the order in which they are used: what a
micro-batch without frames does for the parameters' gradients (`QwenVL._touch_vision`) relies on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dppo_mcore.model.attention import flash_varlen, has_flash_varlen
from dppo_mcore.model.config import VisionConfig

Frame = tuple[int, int]
"""Height and width of one temporal patch, in patches."""


@dataclass(frozen=True)
class SpanGroup:
    """Spans that share one attention call: rows [n, s], clamped where a span is shorter than s."""

    rows_NS: Tensor
    valid_NS: Tensor | None
    """None where every span has length s."""


@dataclass(frozen=True)
class Spans:
    """A partition of P rows into spans that attend within themselves."""

    cu_seqlens: Tensor
    max_seqlen: int
    groups: tuple[SpanGroup, ...]
    inverse_P: Tensor
    """Where row p's output lies in the concatenated groups' outputs."""


@dataclass(frozen=True)
class FrameLayout:
    """Order and attention spans of the patches of some frames."""

    order_U: Tensor
    """Merge units in window order; unit u of the tower's row order is unit order_U[u] of the input."""
    cos_PD: Tensor
    sin_PD: Tensor
    windows: Spans
    frames: Spans


def plan_spans(lengths: Sequence[int], share_up_to: int, device: torch.device) -> Spans:
    """Spans of these lengths, back to back. Those up to `share_up_to` rows share one padded call, longer ones one
    call for each length that occurs."""
    length_N = torch.tensor(lengths, dtype=torch.int64)
    start_N = torch.cumsum(length_N, 0) - length_N
    key_N = torch.where(length_N <= share_up_to, 0, length_N)
    groups: list[SpanGroup] = []
    positions: list[Tensor] = []
    offset = 0
    inverse_P = torch.empty(int(length_N.sum()), dtype=torch.int64)
    for key in key_N.unique().tolist():
        members = (key_N == key).nonzero().flatten()
        own_N, longest = length_N[members], int(length_N[members].max())
        column_S = torch.arange(longest)
        valid_NS = column_S[None, :] < own_N[:, None]
        rows_NS = start_N[members][:, None] + torch.minimum(column_S[None, :], own_N[:, None] - 1)
        inverse_P[rows_NS[valid_NS]] = offset + valid_NS.flatten().nonzero().flatten()
        offset += rows_NS.numel()
        ragged = None if bool(valid_NS.all()) else valid_NS.to(device)
        groups.append(SpanGroup(rows_NS.to(device), ragged))
        positions.append(rows_NS)
    cu_seqlens = F.pad(torch.cumsum(length_N, 0), (1, 0)).to(torch.int32)
    return Spans(cu_seqlens.to(device), int(length_N.max()), tuple(groups), inverse_P.to(device))


def plan_frames(frames: Sequence[Frame], vision: VisionConfig, device: torch.device) -> FrameLayout:
    """Window order, rotary tables and spans of the patches of `frames`, in their order."""
    merge, unit = vision.spatial_merge_size, vision.merge_unit
    side = vision.window_size // vision.patch_size // merge
    orders: list[Tensor] = []
    coordinates: list[Tensor] = []
    windows: list[int] = []
    done = 0
    known: dict[Frame, tuple[Tensor, Tensor, list[int]]] = {}
    for frame in frames:
        if frame not in known:
            known[frame] = _window_order(frame, merge, side)
        order_U, rowcol_P2, lengths = known[frame]
        orders.append(order_U + done)
        coordinates.append(rowcol_P2)
        windows.extend(length * unit for length in lengths)
        done += len(order_U)
    dim = vision.hidden_size // vision.num_heads
    inverse_frequency_F = 1.0 / (10000.0 ** (torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2)))
    angle_P2F = torch.cat(coordinates).to(device)[:, :, None].float() * inverse_frequency_F.to(device)
    angle_PD = angle_P2F.flatten(1).repeat(1, 2)
    return FrameLayout(
        order_U=torch.cat(orders).to(device),
        cos_PD=angle_PD.cos(),
        sin_PD=angle_PD.sin(),
        windows=plan_spans(windows, side * side * unit, device),
        frames=plan_spans([h * w for h, w in frames], 0, device),
    )


def _window_order(frame: Frame, merge: int, side: int) -> tuple[Tensor, Tensor, list[int]]:
    """Of one frame: merge units in window order, (row, column) of their patches, units per window."""
    high, wide = frame[0] // merge, frame[1] // merge
    unit_row, unit_column = (x.flatten() for x in torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"))
    window_U = (unit_row // side) * -(-wide // side) + unit_column // side
    order_U = torch.argsort(window_U, stable=True)
    inner = torch.arange(merge)
    row_UMM = (unit_row[order_U] * merge)[:, None, None] + inner[None, :, None]
    column_UMM = (unit_column[order_U] * merge)[:, None, None] + inner[None, None, :]
    rowcol = torch.stack(torch.broadcast_tensors(row_UMM, column_UMM), dim=-1).reshape(-1, 2)
    return order_U, rowcol, window_U.bincount().tolist()


def span_attention(q_PHD: Tensor, k_PHD: Tensor, v_PHD: Tensor, spans: Spans) -> Tensor:
    """Full attention within each span, [P, heads, D]: one varlen call, or one SDPA call a group."""
    scale = q_PHD.shape[-1] ** -0.5
    if has_flash_varlen() and q_PHD.dtype is not torch.float32:
        return flash_varlen(q_PHD, k_PHD, v_PHD, spans.cu_seqlens, spans.max_seqlen, causal=False, scale=scale)
    outputs: list[Tensor] = []
    for group in spans.groups:
        q, k, v = (x[group.rows_NS].transpose(1, 2) for x in (q_PHD, k_PHD, v_PHD))
        mask = None if group.valid_NS is None else group.valid_NS[:, None, None, :]
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[spans.inverse_P]


class VisionNorm(nn.RMSNorm):
    """RMS norm with the tower's epsilon."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=1e-6)


class PatchEmbed(nn.Module):
    """Patches [P, values] to features [P, C]; the convolution covers a patch exactly, so it is a product."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.proj = nn.Conv3d(vision.in_channels, vision.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches_P: Tensor) -> Tensor:
        return F.linear(patches_P.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class VisionAttention(nn.Module):
    """Bidirectional attention with two-dimensional rotary positions."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.num_heads = vision.num_heads
        self.qkv = nn.Linear(vision.hidden_size, 3 * vision.hidden_size)
        self.proj = nn.Linear(vision.hidden_size, vision.hidden_size)

    def forward(self, x_PC: Tensor, layout: FrameLayout, spans: Spans) -> Tensor:
        q, k, v = self.qkv(x_PC).view(x_PC.shape[0], 3, self.num_heads, -1).unbind(1)
        q, k = _rotate(q, layout), _rotate(k, layout)
        return self.proj(span_attention(q, k, v, spans).flatten(1))


def _rotate(x_PHD: Tensor, layout: FrameLayout) -> Tensor:
    x = x_PHD.float()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * layout.cos_PD[:, None] + turned * layout.sin_PD[:, None]).to(x_PHD.dtype)


class VisionMlp(nn.Module):
    """SwiGLU with biases."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(vision.hidden_size, vision.intermediate_size)
        self.up_proj = nn.Linear(vision.hidden_size, vision.intermediate_size)
        self.down_proj = nn.Linear(vision.intermediate_size, vision.hidden_size)

    def forward(self, x_PC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_PC)) * self.up_proj(x_PC))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.norm1 = VisionNorm(vision.hidden_size)
        self.attn = VisionAttention(vision)
        self.norm2 = VisionNorm(vision.hidden_size)
        self.mlp = VisionMlp(vision)

    def forward(self, x_PC: Tensor, layout: FrameLayout, spans: Spans) -> Tensor:
        x_PC = x_PC + self.attn(self.norm1(x_PC), layout, spans)
        return x_PC + self.mlp(self.norm2(x_PC))


class Merger(nn.Module):
    """Four neighbouring patches to one media embedding."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.width = vision.hidden_size * vision.merge_unit
        self.ln_q = VisionNorm(vision.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, vision.out_hidden_size)
        )

    def forward(self, x_PC: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x_PC).view(-1, self.width))


class VisionTower(nn.Module):
    """Patch embedding, blocks and merger. A frozen part runs without keeping activations."""

    def __init__(self, vision: VisionConfig, recompute: bool = False) -> None:
        super().__init__()
        self.vision = vision
        self.recompute = recompute
        self.patch_embed = PatchEmbed(vision)
        self.blocks = nn.ModuleList(VisionBlock(vision) for _ in range(vision.depth))
        self.merger = Merger(vision)

    def freeze(self, tower: bool, merger: bool) -> None:
        """Exclude the tower (patch embedding and blocks), the merger, or both from learning."""
        for part, frozen in ((self.patch_embed, tower), (self.blocks, tower), (self.merger, merger)):
            part.requires_grad_(not frozen)

    def forward(self, patches_P: Tensor, frames: Sequence[Frame]) -> Tensor:
        """Patches [P, values] of whole frames -> embeddings [P / merge unit, H] in the order of the patches."""
        unit = self.vision.merge_unit
        layout = plan_frames(frames, self.vision, patches_P.device)
        learns = self.patch_embed.proj.weight.requires_grad
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            x_UMC = self.patch_embed(patches_P).view(-1, unit, self.vision.hidden_size)
            x_PC = x_UMC[layout.order_U].flatten(0, 1)
            for index, block in enumerate(self.blocks):
                spans = layout.frames if index in self.vision.full_attention_blocks else layout.windows
                if self.recompute and torch.is_grad_enabled():
                    x_PC = checkpoint(block, x_PC, layout, spans, use_reentrant=False)
                else:
                    x_PC = block(x_PC, layout, spans)
        merged_UH = self.merger(x_PC)
        return merged_UH[torch.argsort(layout.order_U)]
