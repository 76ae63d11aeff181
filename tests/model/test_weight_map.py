"""The weight map against transformers' own key lists, and its slicing against plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_mcore.model.config import QwenConfig, load_qwen_config, parse_qwen_config
from dppo_mcore.model.weight_map import WeightError, WeightMap, canonical_name, global_name, local_spec_name

SIZES: dict[str, dict[str, Any]] = {
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
VISION_FFN = {"3b": 3420, "7b": 3420, "32b": 3456, "72b": 3456}


def released_config(size: str) -> dict[str, Any]:
    """config.json of a released checkpoint, as far as shapes go."""
    text = SIZES[size]
    return {
        **text,
        "model_type": "qwen2_5_vl",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "eos_token_id": 151645,
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": VISION_FFN[size], "num_heads": 16, "in_chans": 3,
            "in_channels": 3, "out_hidden_size": text["hidden_size"], "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_key_list_equals_transformers(size: str) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    raw = released_config(size)
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
