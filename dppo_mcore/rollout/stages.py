"""One forward pass of a row through all pipeline stages, outside of Megatron's training schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dppo_mcore.types import PackedBatch


class Stages:
    """This rank's model chunks and its neighbours in the pipeline."""

    def __init__(self, chunks: Sequence[Any], hidden_size: int) -> None:
        self.chunks = list(chunks)
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self.count = self.group.size()
        self.rank = self.group.rank()
        self.is_last = self.rank == self.count - 1
        self._ranks = dist.get_process_group_ranks(self.group)
        parameter = next(self.chunks[0].language.parameters())
        self.device, self._dtype = parameter.device, parameter.dtype
        config = self.chunks[0].config
        self.length_multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._hidden_size = hidden_size

    def forward(self, batch: PackedBatch, plan: Any, media_embeddings_MH: Tensor | None = None) -> Tensor | None:
        """Hidden states of the loss rows [R, H] on the last stage, None elsewhere. All stages call together.

        The row's length must be a multiple of `length_multiple`. The first stage may be given the row's media
        embeddings instead of encoding its patches.
        """
        output = None
        for number, chunk in enumerate(self.chunks):
            stage = number * self.count + self.rank
            if stage > 0 and self.count > 1:
                chunk.set_input_tensor(self._receive(batch))
            output = chunk.forward_with(batch, plan, media_embeddings_MH if stage == 0 else None)
            if stage < len(self.chunks) * self.count - 1:
                dist.send(output.contiguous(), self._ranks[(self.rank + 1) % self.count], group=self.group)
                output = None
        return output

    def _receive(self, batch: PackedBatch) -> Tensor:
        length = batch.token_ids_L.numel() // self.length_multiple
        activation = torch.empty(length, 1, self._hidden_size, dtype=self._dtype, device=self.device)
        dist.recv(activation, self._ranks[(self.rank - 1) % self.count], group=self.group)
        return activation

    def from_last(self, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The last stage's tensor on all stages."""
        if self.count == 1:
            return tensor
        if not self.is_last:
            tensor = torch.empty(*shape, dtype=dtype, device=self.device)
        dist.broadcast(tensor, self._ranks[-1], group=self.group)
        return tensor
