"""The weight map against transformers' own key lists, and its slicing against plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import plan
import pytest
import torch

from dppo_mcore.model.config import QwenConfig, load_qwen_config, parse_qwen_config
from dppo_mcore.model.weight_map import WeightError, WeightMap, canonical_name, global_name, local_spec_name


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_key_list_equals_transformers(size: str) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    raw = plan.released_config(size)
    with torch.device("meta"):
        reference = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**raw))
    expected = {canonical_name(name): tuple(p.shape) for name, p in reference.named_parameters()}
    weight_map = WeightMap(parse_qwen_config(raw))
    assert weight_map.hf_shapes() == expected
    assert ("lm_head.weight" in expected) == (size != "3b")


@pytest.fixture(scope="module")
def qwen(tiny_dir: str) -> QwenConfig:
    return load_qwen_config(tiny_dir)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_slices_cover_every_tensor_once_and_merge_gives_it_back(qwen: QwenConfig, tp: int) -> None:
    generator = torch.Generator().manual_seed(tp)
    for entry in WeightMap(qwen).entries.values():
        full = {part.name: torch.randn(part.shape, generator=generator) for part in entry.parts}
        seen = {name: torch.zeros(tensor.shape) for name, tensor in full.items()}
        rows = -(-entry.parts[0].shape[0] // (64 * tp)) * 64 * tp
        shards = [torch.full(entry.shape(tp, rows), float("nan")) for _ in range(tp)]
        for rank, shard in enumerate(shards):
            for piece in entry.pieces(shard, tp, rank):
                piece.view.copy_(piece.of(full[piece.tensor.name]))
                seen[piece.tensor.name].narrow(piece.dim, piece.start, piece.length).add_(1)
        copies = tp if entry.kind == "replicated" else 1
        assert all((count == copies).all() for count in seen.values()), entry.name
        for name, tensor in entry.merge(shards):
            assert torch.equal(tensor, full[name]), name


def test_qkv_is_interleaved_by_group(qwen: QwenConfig) -> None:
    """Group g of the parameter: its query heads, its key head, its value head."""
    entry = WeightMap(qwen)["language.decoder.layers.3.self_attention.linear_qkv.bias"]
    hd, groups = qwen.head_dim, qwen.num_kv_heads
    per_group = qwen.num_heads // groups
    q = torch.arange(qwen.num_heads * hd).float()
    k = 10_000 + torch.arange(groups * hd).float()
    v = 20_000 + torch.arange(groups * hd).float()
    by_hand = torch.cat(
        [
            torch.cat(
                [
                    q[g * per_group * hd : (g + 1) * per_group * hd],
                    k[g * hd : (g + 1) * hd],
                    v[g * hd : (g + 1) * hd],
                ]
            )
            for g in range(groups)
        ]
    )
    shard = torch.empty(entry.shape(2))
    for piece in entry.pieces(shard, 2, 1):
        piece.view.copy_(piece.of({"q": q, "k": k, "v": v}[piece.tensor.name.split(".")[-2][0]]))
    assert torch.equal(shard, by_hand[len(by_hand) // 2 :])


def test_keys_under_every_prefix_are_known(qwen: QwenConfig) -> None:
    weight_map = WeightMap(qwen)
    old = list(weight_map.hf_shapes())
    new = [
        name.replace("visual.", "model.visual.") if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1) for name in old
    ]  # fmt: skip
    assert list(weight_map.check_keys(old, "here")) == list(weight_map.check_keys(new, "here")) == old
    assert sum(a != b for a, b in zip(old, new, strict=True)) == len(old) - 1


def test_unknown_missing_and_double_keys_are_named(qwen: QwenConfig) -> None:
    weight_map = WeightMap(qwen)
    keys = list(weight_map.hf_shapes())
    with pytest.raises(WeightError, match=r"folder: unknown key model.layers.99.mlp.up_proj.weight"):
        weight_map.check_keys([*keys, "model.layers.99.mlp.up_proj.weight"], "folder")
    with pytest.raises(WeightError, match=r"folder: missing key model.norm.weight \(1 in all\)"):
        weight_map.check_keys([key for key in keys if key != "model.norm.weight"], "folder")
    with pytest.raises(WeightError, match=r"both name visual.merger.ln_q.weight"):
        weight_map.check_keys([*keys, "model.visual.merger.ln_q.weight"], "folder")
    with pytest.raises(WeightError, match=r"parameter language.nothing"):
        weight_map["language.nothing"]


def test_a_tied_checkpoint_may_carry_its_head_too(tiny_tied_dir: str) -> None:
    weight_map = WeightMap(load_qwen_config(tiny_tied_dir))
    keys = list(weight_map.hf_shapes())
    assert "lm_head.weight" not in keys
    assert list(weight_map.check_keys([*keys, "lm_head.weight"], "folder")) == keys
    assert weight_map["language.output_layer.weight"].copy_of == "language.embedding.word_embeddings.weight"


def test_names_of_both_layer_specs() -> None:
    layer = "language.decoder.layers.5."
    fused = {
        layer + "self_attention.linear_qkv.layer_norm_weight": layer + "input_layernorm.weight",
        layer + "mlp.linear_fc1.layer_norm_weight": layer + "pre_mlp_layernorm.weight",
        layer + "mlp.linear_fc1.weight": layer + "mlp.linear_fc1.weight",
    }
    assert {name: local_spec_name(name) for name in fused} == fused
    assert global_name(layer + "mlp.linear_fc1.weight", 16) == "language.decoder.layers.21.mlp.linear_fc1.weight"
    assert global_name("vision.blocks.1.norm1.weight", 16) == "vision.blocks.1.norm1.weight"


def test_a_checkpoint_made_by_transformers_fits(qwen: QwenConfig, tiny_dir: str) -> None:
    index = Path(tiny_dir) / "model.safetensors.index.json"
    if index.exists():
        names = list(json.loads(index.read_text())["weight_map"])
    else:
        from dppo_mcore.model.safetensors_io import read_header

        names = list(read_header(Path(tiny_dir) / "model.safetensors"))
    WeightMap(qwen).check_keys(names, tiny_dir)
