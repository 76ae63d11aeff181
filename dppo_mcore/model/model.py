"""Qwen2.5-VL over Megatron-Core: one pipeline chunk of it, and how all of a rank's chunks are built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from dppo_mcore.config import Config, ModelConfig
from dppo_mcore.model.attention import plan_attention
from dppo_mcore.model.config import QwenConfig, transformer_config
from dppo_mcore.model.language import build_language
from dppo_mcore.model.media import GatherFrames, ZeroGrad, check_media, share_frames
from dppo_mcore.model.vision import VisionTower
from dppo_mcore.runtime import device
from dppo_mcore.types import PackedBatch

Grid = tuple[int, int, int]


class QwenVL(MegatronModule):
    """One pipeline chunk: the vision tower on the first, hidden states of the loss rows from the last.

    The head (`head_weight`) is applied outside, to loss rows only, by an operation that returns the hidden states'
    gradient already summed over the tensor-parallel group. So the last stage hands hidden states out without a
    further reduction in the backward pass: under sequence parallelism the gather's backward is a plain split, not
    a reduce-scatter, and without it there is no all-reduce.
    """

    def __init__(self, qwen: QwenConfig, config: TransformerConfig, model: ModelConfig, vp_stage: int | None) -> None:
        super().__init__(config=config)
        self.qwen = qwen
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.share_embeddings_and_output_weights = qwen.tie_word_embeddings
        self.attention_backend = model.attention_backend
        self.vision: VisionTower | None = None
        if self.pre_process:
            recompute = model.recompute_granularity == "full"
            with device.device():
                self.vision = VisionTower(qwen.vision, recompute).to(config.params_dtype)
            self.vision.freeze(tower=model.freeze_vision, merger=model.freeze_merger)
            for parameter in self.vision.parameters():
                parameter.average_gradients_across_tp_domain = True
        self.language = build_language(
            qwen, config, pre_process=self.pre_process, post_process=self.post_process, vp_stage=vp_stage
        )
        self.language.requires_grad_(not model.freeze_language)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Take the previous stage's activation (Megatron's schedules call this)."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight, where this stage holds it (Megatron reduces its gradient over first and last stage)."""
        return self.language.shared_embedding_or_output_weight()

    def head_weight(self) -> nn.Parameter:
        """This rank's vocabulary shard of the head, [V_local, H]; last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.language.shared_embedding_or_output_weight()
        return self.language.output_layer.weight

    def forward(self, batch: PackedBatch, media_embeddings: Tensor | None = None) -> Tensor:
        """One packed row: hidden states of the loss rows [R, H] from the last stage (no logits), else the stage's
        activation [L, 1, H] (sharded over L with sequence parallelism).

        `media_embeddings` [M, H] stand in for encoding the row's patches (a frozen tower's, kept from before).
        """
        plan = plan_attention(batch.segments_L, batch.branches_L, self.attention_backend)
        return self.forward_with(batch, plan, media_embeddings)

    def forward_with(self, batch: PackedBatch, plan: Any, media_embeddings: Tensor | None = None) -> Tensor:
        """`forward` under another attention plan (`attention.Attend`): one that records keys and values, or answers
        from those it has."""
        embedded = self._embed(batch, media_embeddings) if self.pre_process else None
        hidden = self._layers(embedded, batch.position_ids_3L, plan)
        if not self.post_process:
            return hidden
        return hidden.squeeze(1).index_select(0, batch.loss_rows_R.to(hidden.device, non_blocking=True))

    def _layers(self, embedded_L1H: Tensor | None, position_ids_3L: Tensor, plan: Any) -> Tensor:
        """This chunk's layers; the last stage's output is gathered over L."""
        if embedded_L1H is not None and self.config.sequence_parallel:
            embedded_L1H = tensor_parallel.scatter_to_sequence_parallel_region(embedded_L1H)
        hidden = self.language(
            input_ids=None,
            position_ids=position_ids_3L.to(self.device, non_blocking=True).unsqueeze(1),
            attention_mask=None,
            decoder_input=embedded_L1H,
            packed_seq_params=plan,
        )
        if self.post_process and self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.language.parameters()).device

    def _tokens(self, token_ids_L: Tensor) -> Tensor:
        """Token embeddings [L, 1, H], whole on every tensor-parallel rank."""
        ids_1L = token_ids_L.to(self.device, non_blocking=True).unsqueeze(0)
        return self.language.embedding(input_ids=ids_1L, position_ids=None)

    def _embed(self, batch: PackedBatch, media_embeddings: Tensor | None) -> Tensor:
        """Token embeddings with the media in their places, [L, 1, H]."""
        check_media(batch, self.qwen, None if media_embeddings is None else media_embeddings.shape[0])
        embedded_L1H = self._tokens(batch.token_ids_L)
        if media_embeddings is not None or not batch.grids:
            embedded_L1H = self._touch_vision(embedded_L1H)
        if not batch.grids:
            return embedded_L1H
        if media_embeddings is None:
            media_embeddings = self.encode_media(batch.patches_P, batch.grids)
        rows_M = batch.media_rows_M.to(self.device, non_blocking=True)
        media_M1H = media_embeddings.to(self.device, embedded_L1H.dtype).unsqueeze(1)
        return embedded_L1H.index_copy(0, rows_M, media_M1H)

    def encode_media(self, patches_P: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Media embeddings [M, H] of all patches [P, values]: each tensor-parallel rank encodes its share of the
        frames, one all-gather brings them together. First stage only; every rank of the group calls it."""
        group = parallel_state.get_tensor_model_parallel_group()
        shares = share_frames(tuple(grids), group.size(), self.qwen.vision.merge_unit)
        weight = self.vision.patch_embed.proj.weight
        own = shares.frames[group.rank()]
        if own:
            rows = shares.rows(group.rank(), in_units=False) if group.size() > 1 else slice(None)
            patches = patches_P[rows.to(patches_P.device) if isinstance(rows, Tensor) else rows]
            patches = patches.to(weight.device, weight.dtype, non_blocking=True)
            local_UH = self.vision(patches, [shares.sizes[frame] for frame in own])
        else:
            local_UH = self._touch_vision(weight.new_zeros(0, self.qwen.hidden_size))
        return GatherFrames.apply(local_UH, shares, group) if group.size() > 1 else local_UH

    def _touch_vision(self, x: Tensor) -> Tensor:
        """`x`, from which the backward pass gives every learning vision parameter a zero gradient.

        One after the other, in the order in which frames would: Megatron reduces a bucket of gradients as soon as they
        are there, and data-parallel ranks must come to their buckets in one order, with frames and without.
        """
        if torch.is_grad_enabled():
            for parameter in self.vision.parameters():
                if parameter.requires_grad:
                    x = ZeroGrad.apply(x, parameter)
        return x


def build_model(qwen: QwenConfig, config: Config) -> list[QwenVL]:
    """This rank's model chunks (one per virtual stage), on the device, randomly initialised, unwrapped."""
    transformer = transformer_config(qwen, config.parallel, config.model)
    stages = config.parallel.virtual_pipeline_model_parallel_size
    return [QwenVL(qwen, transformer, config.model, stage) for stage in ([None] if stages is None else range(stages))]
