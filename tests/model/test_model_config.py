"""Architectures from config.json, and layouts that the model refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dppo_mcore.config import ModelConfig
from dppo_mcore.model.config import QwenConfig, check_layout, load_qwen_config, padded_vocab_size, parse_qwen_config
from tests.model.harness import layout


def test_flat_and_nested_configurations_are_the_same(tiny_dir: str, tiny_legacy_dir: str) -> None:
    assert load_qwen_config(tiny_dir) == load_qwen_config(tiny_legacy_dir)


def test_tied_is_read(tiny_dir: str, tiny_tied_dir: str) -> None:
    assert not load_qwen_config(tiny_dir).tie_word_embeddings
    assert load_qwen_config(tiny_tied_dir).tie_word_embeddings


def test_a_missing_key_is_named(tiny_dir: str) -> None:
    raw = json.loads((Path(tiny_dir) / "config.json").read_text())
    del raw["vision_config"]["tokens_per_second"]
    with pytest.raises(ValueError, match="tokens_per_second is missing"):
        parse_qwen_config(raw)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("rope", {"rope_type": "yarn", "factor": 4.0}, "rope scaling of type 'yarn' is not supported"),
        ("rope", {"type": "linear"}, "rope scaling of type 'linear' is not supported"),
        ("text_config", {"use_sliding_window": True}, "sliding-window attention is not supported"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu'"),
    ],
)
def test_variants_that_would_compute_something_else_are_refused(
    tiny_dir: str, section: str, change: dict[str, Any], message: str
) -> None:
    raw = json.loads((Path(tiny_dir) / "config.json").read_text())
    text = raw["text_config"]
    changed = (
        text["rope_parameters" if "rope_parameters" in text else "rope_scaling"] if section == "rope" else raw[section]
    )
    changed.update(change)
    with pytest.raises(ValueError, match=message):
        parse_qwen_config(raw)


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        parse_qwen_config({"model_type": "llama"})


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"tp": 8}, "--tensor-model-parallel-size 8 does not divide the model's 4 KV heads"),
        ({"pp": 3}, "--pipeline-model-parallel-size 3"),
        ({"pp": 2, "vpp": 3}, "--virtual-pipeline-model-parallel-size 3"),
        ({"vpp": 2}, "--virtual-pipeline-model-parallel-size needs"),
        ({"sp": True}, "--sequence-parallel needs"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2: only 1"),
        ({"num_layers_in_first_pipeline_stage": 3}, "need --pipeline-model-parallel-size > 1"),
        ({"pp": 2, "num_layers_in_first_pipeline_stage": 8}, "--pipeline-model-parallel-size 2"),
        ({"pp": 2, "num_layers_in_first_pipeline_stage": 0}, "--num-layers-in-first-pipeline-stage 0: at least 1"),
        ({"pp": 2, "num_layers_in_last_pipeline_stage": -1}, "--num-layers-in-last-pipeline-stage -1: at least 1"),
        ({"pp": 4, "num_layers_in_first_pipeline_stage": 1}, "set --num-layers-in-first-pipeline-stage"),
    ],
)
def test_impossible_layouts_name_their_flag(qwen: QwenConfig, arguments: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag.replace("(", r"\(")):
        check_layout(qwen, layout(**arguments))


@pytest.mark.parametrize("arguments", [{}, {"tp": 4, "sp": True}, {"pp": 4, "vpp": 2}, {"tp": 2, "pp": 2, "vpp": 4}])
def test_possible_layouts_pass(qwen: QwenConfig, arguments: dict[str, Any]) -> None:
    check_layout(qwen, layout(**arguments))


def test_vocabulary_is_padded_to_even_shards(qwen: QwenConfig) -> None:
    assert padded_vocab_size(qwen, 4) == 1024
    from dataclasses import replace

    assert padded_vocab_size(replace(qwen, vocab_size=1025), 4) == 1280
    assert padded_vocab_size(replace(qwen, vocab_size=151936), 2) == 151936


def test_default_precision_is_bf16() -> None:
    assert ModelConfig().dtype == "bf16"
