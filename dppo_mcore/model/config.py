"""A checkpoint's architecture (`QwenConfig`, from its config.json) and Megatron's view of it.

Only `transformer_config` needs megatron-core; the rest imports without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dppo_mcore.config import ModelConfig, ParallelConfig
from dppo_mcore.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower and its merger."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int
    """Side of an attention window in pixels."""
    full_attention_blocks: tuple[int, ...]
    """Blocks that attend over a whole frame instead of within windows."""
    in_channels: int
    out_hidden_size: int
    tokens_per_second: float
    """Temporal positions per second of video."""

    @property
    def patch_values(self) -> int:
        """Numbers in one patch row."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True, slots=True)
class QwenConfig:
    """A Qwen2.5-VL architecture."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    vision: VisionConfig


def load_qwen_config(model_dir: str | Path) -> QwenConfig:
    """Read `config.json` of a Hugging Face directory."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --model must name a Hugging Face Qwen2.5-VL directory")
    return parse_qwen_config(json.loads(path.read_text()), str(path))


def parse_qwen_config(raw: Mapping[str, Any], source: str = "config.json") -> QwenConfig:
    """Parse the flat form of the released checkpoints or the nested one of newer transformers."""
    if raw.get("model_type") != "qwen2_5_vl":
        raise UserError(f"{source}: model_type is {raw.get('model_type')!r}, only 'qwen2_5_vl' is supported")
    text = raw.get("text_config", raw)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}

    def pick(section: Mapping[str, Any], *names: str) -> Any:
        for name in names:
            if section.get(name) is not None:
                return section[name]
        raise UserError(f"{source}: {names[0]} is missing")

    vision = pick(raw, "vision_config")
    _refuse_variants(text, vision, rope, source)
    heads, hidden_size = pick(text, "num_attention_heads"), pick(text, "hidden_size")
    config = QwenConfig(
        hidden_size=hidden_size,
        intermediate_size=pick(text, "intermediate_size"),
        num_layers=pick(text, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=pick(text, "num_key_value_heads"),
        head_dim=text.get("head_dim") or hidden_size // heads,
        vocab_size=pick(text, "vocab_size"),
        rms_norm_eps=pick(text, "rms_norm_eps"),
        rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else pick(text, "rope_theta")),
        mrope_section=tuple(pick(rope, "mrope_section")),
        max_position_embeddings=pick(text, "max_position_embeddings"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        image_token_id=pick(raw, "image_token_id"),
        video_token_id=pick(raw, "video_token_id"),
        vision_start_token_id=pick(raw, "vision_start_token_id"),
        vision_end_token_id=pick(raw, "vision_end_token_id"),
        vision=VisionConfig(
            depth=pick(vision, "depth"),
            hidden_size=pick(vision, "hidden_size"),
            intermediate_size=pick(vision, "intermediate_size"),
            num_heads=pick(vision, "num_heads"),
            patch_size=pick(vision, "patch_size", "spatial_patch_size"),
            spatial_merge_size=pick(vision, "spatial_merge_size"),
            temporal_patch_size=pick(vision, "temporal_patch_size"),
            window_size=pick(vision, "window_size"),
            full_attention_blocks=tuple(pick(vision, "fullatt_block_indexes")),
            in_channels=pick(vision, "in_channels", "in_chans"),
            out_hidden_size=pick(vision, "out_hidden_size"),
            tokens_per_second=pick(vision, "tokens_per_second"),
        ),
    )
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise UserError(f"{source}: mrope_section {config.mrope_section} must sum to half of head_dim")
    if config.vision.out_hidden_size != config.hidden_size:
        raise UserError(f"{source}: vision out_hidden_size differs from hidden_size")
    return config


def _refuse_variants(text: Mapping[str, Any], vision: Mapping[str, Any], rope: Mapping[str, Any], source: str) -> None:
    """Refuse settings that would change the model's output and that it doesn't follow."""
    for name in ("rope_type", "type"):
        if rope.get(name, "default") not in ("default", "mrope"):
            raise UserError(f"{source}: rope scaling of type {rope[name]!r} is not supported, only plain mrope")
    for section, where in ((text, ""), (vision, "vision_config.")):
        if section.get("hidden_act", "silu") != "silu":
            raise UserError(f"{source}: {where}hidden_act is {section['hidden_act']!r}, only 'silu' is supported")
    if text.get("use_sliding_window") or "sliding_attention" in (text.get("layer_types") or ()):
        raise UserError(f"{source}: sliding-window attention is not supported; set use_sliding_window to false")


def padded_vocab_size(qwen: QwenConfig, tensor_parallel: int) -> int:
    """Rows of embedding and head: the vocabulary rounded up so that every shard is a multiple of 64."""
    multiple = 64 * tensor_parallel
    return -(-qwen.vocab_size // multiple) * multiple


def check_layout(qwen: QwenConfig, parallel: ParallelConfig) -> None:
    """Refuse a layout this model cannot take, naming the flag."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if parallel.context_parallel_size != 1:
        raise UserError(f"--context-parallel-size {parallel.context_parallel_size}: only 1 is supported")
    for name, size in (("KV heads", qwen.num_kv_heads), ("heads", qwen.num_heads), ("FFN", qwen.intermediate_size)):
        if size % tp:
            raise UserError(f"--tensor-model-parallel-size {tp} does not divide the model's {size} {name}")
    if parallel.sequence_parallel and tp == 1:
        raise UserError("--sequence-parallel needs --tensor-model-parallel-size > 1")
    if vpp is not None and pp == 1:
        raise UserError("--virtual-pipeline-model-parallel-size needs --pipeline-model-parallel-size > 1")
    if pp == 1:
        if first is not None or last is not None:
            raise UserError("--num-layers-in-first/last-pipeline-stage need --pipeline-model-parallel-size > 1")
        return
    for name, size in (("first", first), ("last", last)):
        if size is not None and size < 1:
            raise UserError(f"--num-layers-in-{name}-pipeline-stage {size}: at least 1 is needed")
    middle = qwen.num_layers - (first or 0) - (last or 0)
    stages = pp - (first is not None) - (last is not None)
    if middle < 0 or (stages == 0 and middle) or (stages and middle % stages) or (stages and not middle):
        raise UserError(
            f"--pipeline-model-parallel-size {pp}: {middle} layers do not divide over {stages} stages; "
            "set --num-layers-in-first-pipeline-stage and --num-layers-in-last-pipeline-stage"
        )
    sizes = {first, last, middle // stages if stages else None} - {None}
    if vpp is not None and any(size % vpp for size in sizes):
        raise UserError(
            f"--virtual-pipeline-model-parallel-size {vpp} does not divide the layers per stage {sorted(sizes)}"
        )


def transformer_config(qwen: QwenConfig, parallel: ParallelConfig, model: ModelConfig) -> TransformerConfig:
    """Megatron's configuration of the language model.

    Losses are sums over tokens normalised once for all ranks, so gradients are summed, not averaged, over
    data-parallel ranks (`calculate_per_token_loss`). The interleaved schedule keeps its outputs and uses plain
    point-to-point calls: with batched ones it gives wrong losses on gloo.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812
    from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
    from megatron.core.transformer import TransformerConfig

    from dppo_mcore.model.language import uses_transformer_engine

    check_layout(qwen, parallel)
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    fused = uses_transformer_engine()
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if parallel.pipeline_model_parallel_size == 2 and first is not None:
        last = None  # It follows from the first; Megatron would divide by the number of stages between them.
    recompute: dict[str, Any] = {}
    if model.recompute_granularity == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform",
                     "recompute_num_layers": model.recompute_num_layers}  # fmt: skip
    elif model.recompute_granularity == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
    return TransformerConfig(
        num_layers=qwen.num_layers,
        hidden_size=qwen.hidden_size,
        ffn_hidden_size=qwen.intermediate_size,
        num_attention_heads=qwen.num_heads,
        num_query_groups=qwen.num_kv_heads,
        kv_channels=qwen.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=qwen.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(qwen.mrope_section),
        rotary_interleaved=False,
        apply_rope_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        use_cpu_initialization=False,
        gradient_accumulation_fusion=fused and _grad_accum_fusion_available,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        persist_layer_norm=fused,
        masked_softmax_fusion=False,
        cross_entropy_loss_fusion=False,
        attention_softmax_in_fp32=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=not interleaved,
        **recompute,
    )
