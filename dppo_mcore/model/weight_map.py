"""Which Hugging Face tensors make which Megatron parameter, and where a tensor-parallel rank's share lies in each.

Pure metadata and views: no process groups, no files. Loading, export and the weight sync all go through `pieces`,
so there is one converter. Hugging Face names are the released checkpoints' (`model.*`, `visual.*`, `lm_head.*`),
which transformers and SGLang both read; `canonical_name` brings newer prefixes to them.
Megatron names carry the global layer number and the local spec's module names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.runtime.errors import UserError

Kind = Literal["column", "row", "qkv", "gate_up", "vocab", "replicated"]

_LAYER = re.compile(r"^(language\.decoder\.layers\.)(\d+)(\..+)$")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))


class WeightError(UserError):
    """A checkpoint that doesn't fit the model; the message names the key or file."""


@dataclass(frozen=True, slots=True)
class HfTensor:
    """One tensor of the checkpoint, under its canonical name."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's share of an HF tensor: `view` (into the rank's shard) is `hf.narrow(dim, start, length)` reshaped."""

    tensor: HfTensor
    view: Tensor
    dim: int
    start: int
    length: int

    def of(self, full: Tensor) -> Tensor:
        """The share as a view into the full HF tensor, shaped as `view`."""
        return full.narrow(self.dim, self.start, self.length).view(self.view.shape)

    @property
    def numel(self) -> int:
        """Elements of the share."""
        return prod(self.tensor.shape) // self.tensor.shape[self.dim] * self.length


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """One Megatron parameter and the HF tensors it is made of (q, k, v; gate, up; or a single one)."""

    name: str
    kind: Kind
    parts: tuple[HfTensor, ...]
    layer: int | None = None
    """Global layer number; None outside the decoder's layers."""
    copy_of: str | None = None
    """A tied head's own copy of the embedding: loaded, never exported."""
    groups: int = 1
    """Key-value groups of a qkv parameter."""

    def shape(self, tp: int = 1, vocab_rows: int | None = None) -> tuple[int, ...]:
        """Shape of one rank's shard; `vocab_rows` is the padded vocabulary of a vocab parameter."""
        first = self.parts[0].shape
        if self.kind == "row":
            return (first[0], first[1] // tp)
        if self.kind == "vocab":
            return ((vocab_rows or first[0]) // tp, *first[1:])
        if self.kind in ("qkv", "gate_up", "column"):
            return (sum(part.shape[0] for part in self.parts) // tp, *first[1:])
        return first

    def pieces(self, shard: Tensor, tp: int, rank: int) -> list[Piece]:
        """Where each part of `shard` lies in its HF tensor, for rank `rank` of `tp`.

        Rows of the padded vocabulary beyond the checkpoint's belong to no piece.
        """
        first = self.parts[0]
        if self.kind == "replicated":
            return [Piece(first, shard.view(first.shape), 0, 0, first.shape[0])]
        if self.kind == "row":
            columns = first.shape[1] // tp
            return [Piece(first, shard, 1, rank * columns, columns)]
        if self.kind == "vocab":
            start = rank * shard.shape[0]
            rows = max(0, min(shard.shape[0], first.shape[0] - start))
            return [Piece(first, shard[:rows], 0, start, rows)] if rows else []
        if self.kind == "qkv":
            return self._qkv_pieces(shard, tp, rank)
        pieces, offset = [], 0
        for part in self.parts:
            rows = part.shape[0] // tp
            pieces.append(Piece(part, shard[offset : offset + rows], 0, rank * rows, rows))
            offset += rows
        return pieces

    def _qkv_pieces(self, shard: Tensor, tp: int, rank: int) -> list[Piece]:
        """Megatron keeps, group by group, the group's query heads, then its key head, then its value head."""
        groups = self.groups // tp
        by_group = shard.unflatten(0, (groups, -1))
        pieces, offset = [], 0
        for part in self.parts:
            rows = part.shape[0] // self.groups
            view = by_group[:, offset : offset + rows]
            pieces.append(Piece(part, view, 0, rank * groups * rows, groups * rows))
            offset += rows
        return pieces

    def merge(self, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """(HF name, full tensor) of each part from all ranks' shards in rank order; one is enough if replicated."""
        if self.kind == "replicated":
            return [(self.parts[0].name, shards[0].view(self.parts[0].shape))]
        full = {
            part.name: torch.empty(part.shape, dtype=shards[0].dtype, device=shards[0].device) for part in self.parts
        }
        for rank, shard in enumerate(shards):
            for piece in self.pieces(shard, len(shards), rank):
                piece.of(full[piece.tensor.name]).copy_(piece.view)
        return list(full.items())


@dataclass(frozen=True)
class WeightMap:
    """All parameters of the model, in forward order, by Megatron name."""

    qwen: QwenConfig
    entries: Mapping[str, WeightEntry] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        entries = [*_vision_entries(self.qwen), *_language_entries(self.qwen)]
        object.__setattr__(self, "entries", {entry.name: entry for entry in entries})

    def __getitem__(self, name: str) -> WeightEntry:
        try:
            return self.entries[local_spec_name(name)]
        except KeyError:
            raise WeightError(f"parameter {name} of the model has no counterpart in a Qwen2.5-VL checkpoint") from None

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key of the checkpoint with its shape; each belongs to exactly one exported entry."""
        return {part.name: part.shape for entry in self.exported() for part in entry.parts}

    def exported(self) -> Iterable[WeightEntry]:
        """Entries whose tensors a checkpoint holds (a tied head's copy isn't one)."""
        return (entry for entry in self.entries.values() if entry.copy_of is None)

    def check_keys(self, names: Iterable[str], where: str) -> dict[str, str]:
        """Match a checkpoint's keys; canonical name -> name in the file. Unknown, double or missing keys are errors."""
        expected, found = self.hf_shapes(), {}
        for name in names:
            canonical = canonical_name(name)
            if canonical == "lm_head.weight" and self.qwen.tie_word_embeddings:
                continue
            if canonical not in expected:
                raise WeightError(f"{where}: unknown key {name}; is config.json the checkpoint's own?")
            if canonical in found:
                raise WeightError(f"{where}: {found[canonical]} and {name} both name {canonical}")
            found[canonical] = name
        missing = [name for name in expected if name not in found]
        if missing:
            raise WeightError(
                f"{where}: missing key {missing[0]} ({len(missing)} in all); the checkpoint is incomplete"
            )
        return found


def canonical_name(name: str) -> str:
    """A checkpoint's key under the released checkpoints' prefixes."""
    for new, old in _PREFIXES:
        if name.startswith(new):
            return old + name[len(new) :]
    return name


def local_spec_name(name: str) -> str:
    """A parameter's name with Transformer Engine's fused norms under the local spec's names."""
    for fused, plain in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name[: -len(fused)] + plain
    return name


def global_name(name: str, first_layer: int) -> str:
    """A chunk's parameter name with its layer counted over the whole model (`first_layer`: the chunk's first)."""
    match = _LAYER.match(name)
    return f"{match[1]}{int(match[2]) + first_layer}{match[3]}" if match else name


def _vision_entries(qwen: QwenConfig) -> Iterable[WeightEntry]:
    """The tower and merger: replicated, under the checkpoint's own names (its qkv is fused there too)."""
    vision = qwen.vision
    hidden, ffn = vision.hidden_size, vision.intermediate_size
    merged = hidden * vision.spatial_merge_size**2
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (
            hidden,
            vision.in_channels,
            vision.temporal_patch_size,
            vision.patch_size,
            vision.patch_size,
        )
    }
    for block in range(vision.depth):
        prefix = f"blocks.{block}."
        shapes |= {
            prefix + "norm1.weight": (hidden,),
            prefix + "norm2.weight": (hidden,),
            prefix + "attn.qkv.weight": (3 * hidden, hidden),
            prefix + "attn.qkv.bias": (3 * hidden,),
            prefix + "attn.proj.weight": (hidden, hidden),
            prefix + "attn.proj.bias": (hidden,),
        }
        for part in ("gate_proj", "up_proj"):
            shapes |= {f"{prefix}mlp.{part}.weight": (ffn, hidden), f"{prefix}mlp.{part}.bias": (ffn,)}
        shapes |= {prefix + "mlp.down_proj.weight": (hidden, ffn), prefix + "mlp.down_proj.bias": (hidden,)}
    shapes |= {
        "merger.ln_q.weight": (hidden,),
        "merger.mlp.0.weight": (merged, merged),
        "merger.mlp.0.bias": (merged,),
        "merger.mlp.2.weight": (vision.out_hidden_size, merged),
        "merger.mlp.2.bias": (vision.out_hidden_size,),
    }
    for name, shape in shapes.items():
        yield WeightEntry(f"vision.{name}", "replicated", (HfTensor(f"visual.{name}", shape),))


def _language_entries(qwen: QwenConfig) -> Iterable[WeightEntry]:
    hidden, vocab = qwen.hidden_size, qwen.vocab_size
    embedding = HfTensor("model.embed_tokens.weight", (vocab, hidden))
    embedding_name = "language.embedding.word_embeddings.weight"
    yield WeightEntry(embedding_name, "vocab", (embedding,))
    for layer in range(qwen.num_layers):
        yield from _layer_entries(qwen, layer)
    norm = HfTensor("model.norm.weight", (hidden,))
    yield WeightEntry("language.decoder.final_layernorm.weight", "replicated", (norm,))
    head = "language.output_layer.weight"
    if qwen.tie_word_embeddings:
        yield WeightEntry(head, "vocab", (embedding,), copy_of=embedding_name)
    else:
        yield WeightEntry(head, "vocab", (HfTensor("lm_head.weight", (vocab, hidden)),))


def _layer_entries(qwen: QwenConfig, layer: int) -> Iterable[WeightEntry]:
    hidden, ffn = qwen.hidden_size, qwen.intermediate_size
    query, key = qwen.num_heads * qwen.head_dim, qwen.num_kv_heads * qwen.head_dim
    name, hf = f"language.decoder.layers.{layer}.", f"model.layers.{layer}."

    def entry(megatron: str, kind: Kind, *parts: tuple[str, tuple[int, ...]]) -> WeightEntry:
        tensors = tuple(HfTensor(hf + part, shape) for part, shape in parts)
        return WeightEntry(name + megatron, kind, tensors, layer, groups=qwen.num_kv_heads)

    rows = (("q", query), ("k", key), ("v", key))
    yield entry("input_layernorm.weight", "replicated", ("input_layernorm.weight", (hidden,)))
    yield entry(
        "self_attention.linear_qkv.weight", "qkv", *((f"self_attn.{x}_proj.weight", (n, hidden)) for x, n in rows)
    )
    yield entry("self_attention.linear_qkv.bias", "qkv", *((f"self_attn.{x}_proj.bias", (n,)) for x, n in rows))
    yield entry("self_attention.linear_proj.weight", "row", ("self_attn.o_proj.weight", (hidden, query)))
    yield entry("pre_mlp_layernorm.weight", "replicated", ("post_attention_layernorm.weight", (hidden,)))
    yield entry(
        "mlp.linear_fc1.weight",
        "gate_up",
        ("mlp.gate_proj.weight", (ffn, hidden)),
        ("mlp.up_proj.weight", (ffn, hidden)),
    )
    yield entry("mlp.linear_fc2.weight", "row", ("mlp.down_proj.weight", (hidden, ffn)))
