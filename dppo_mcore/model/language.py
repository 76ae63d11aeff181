"""The language model: Megatron's GPTModel that hands out hidden states instead of logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from dppo_mcore.model.attention import PackedCoreAttention
from dppo_mcore.model.config import QwenConfig, padded_vocab_size
from dppo_mcore.runtime import device


def uses_transformer_engine() -> bool:
    """Whether layers are built from Transformer Engine: on CUDA, where it is installed."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE and device.device().type == "cuda"


class RMSNorm(torch.nn.RMSNorm):
    """Norm of the local spec; its gradient is summed over tensor-parallel ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device.device())
        self.weight.sequence_parallel = config.sequence_parallel


class LanguageModel(GPTModel):
    """GPTModel whose last stage returns normed hidden states [L, 1, H] (sharded over L with sequence parallelism)."""

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def build_language(
    qwen: QwenConfig, config: TransformerConfig, *, pre_process: bool, post_process: bool, vp_stage: int | None
) -> LanguageModel:
    """The layers of one pipeline chunk, with embedding and head where they belong."""
    return LanguageModel(
        config,
        transformer_layer_spec=block_spec(config, vp_stage),
        vocab_size=padded_vocab_size(qwen, config.tensor_model_parallel_size),
        max_sequence_length=qwen.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=qwen.tie_word_embeddings,
        position_embedding_type="mrope",
        rotary_base=int(qwen.rope_theta),
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
    )


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Layers of a chunk with our core attention, from Transformer Engine's modules or Megatron's own."""
    if uses_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = norm
        layer.submodules.pre_mlp_layernorm = norm
    attention: ModuleSpec = layer.submodules.self_attention
    attention.submodules.core_attention = PackedCoreAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)
