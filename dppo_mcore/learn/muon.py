"""Muon for matrices and AdamW for everything else, sharded over data-parallel ranks by whole parameters.

Momentum is orthogonalised on whole, unfused matrices: weights sharded over tensor-parallel ranks are gathered to one
of them, weight by weight in turn, so every rank works on its share and the update is that of a single rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from dppo_mcore.config import Config
from dppo_mcore.learn.layerwise import deal, share_updates
from dppo_mcore.learn.orthogonal import STEPS, Layout, orthogonalise_all

RMS_OF_ADAMW = 0.2
"""An AdamW update has about this root mean square; scaling Muon's to it lets both share a learning rate."""


@dataclass
class Owned:
    """A parameter this rank updates, with its fp32 weights and state."""

    parameter: nn.Parameter
    main: Tensor
    """fp32 weights; the parameter's own storage if it is fp32."""
    layout: Layout | None
    """How to orthogonalise it; None for AdamW."""
    state: dict[str, Tensor]

    @property
    def grad(self) -> Tensor:
        """Reduced fp32 gradient."""
        return self.parameter.main_grad


class Muon:
    """Layer-wise sharded Muon + AdamW over chunks whose gradients are all-reduced."""

    def __init__(self, config: Config, chunks: Sequence[DistributedDataParallel]) -> None:
        self.options = config.optimizer
        self.tensor_parallel = parallel_state.get_tensor_model_parallel_group()
        self.data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.model_parallel = parallel_state.get_model_parallel_group()
        named = [(n, p) for chunk in chunks for n, p in chunk.module.named_parameters() if p.requires_grad]
        layouts = [layout_of(name, p, chunks[0].module.config, self.tensor_parallel.size()) for name, p in named]
        costs = [update_cost(p, layout) for (_, p), layout in zip(named, layouts, strict=True)]
        self.parameters = [p for _, p in named]
        self.owners = deal(costs, self.data_parallel.size())
        mine = self.data_parallel.rank()
        self.owned = [
            Owned(p, p.detach() if p.dtype == torch.float32 else p.detach().float().clone(), layout, {})
            for p, layout, owner in zip(self.parameters, layouts, self.owners, strict=True)
            if owner == mine
        ]
        self.adam_steps = 0
        self.reset()

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> tuple[float, bool]:
        """One update with the global gradient clipped to norm `clip`."""
        norm = self._grad_norm()
        if not math.isfinite(norm):
            return norm, False
        if clip > 0 and norm > clip and self.owned:
            torch._foreach_mul_([owned.grad for owned in self.owned], clip / (norm + 1e-6))
        self._step_matrices([owned for owned in self.owned if owned.layout is not None], lr)
        self.adam_steps += 1
        rest = [owned for owned in self.owned if owned.layout is None]
        self._step_adamw([owned for owned in rest if owned.main.ndim > 1], lr, self.options.weight_decay)
        self._step_adamw([owned for owned in rest if owned.main.ndim == 1], lr, 0.0)
        for owned in self.owned:
            if owned.main.data_ptr() != owned.parameter.data_ptr():
                owned.parameter.copy_(owned.main)
        share_updates(self.parameters, self.owners, self.data_parallel)
        return norm, True

    def reset(self) -> None:
        """Forget momentum and moments."""
        self.adam_steps = 0
        for owned in self.owned:
            names = ("momentum",) if owned.layout is not None else ("exp_avg", "exp_avg_sq")
            for name in names:
                held = owned.state.get(name)
                owned.state[name] = torch.zeros_like(owned.main) if held is None else held.zero_()

    @torch.no_grad()
    def reload_model_params(self) -> None:
        """Take fp32 weights from the model again."""
        for owned in self.owned:
            if owned.main.data_ptr() != owned.parameter.data_ptr():
                owned.main.copy_(owned.parameter)

    def sharded_state_dict(self, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
        """Each owner's tensors under its parameter's global name and shape: loadable under any layout."""
        entries = get_param_id_to_sharded_param_map(model_state, (owned.parameter for owned in self.owned))
        state: dict[str, Any] = {"adam_steps": self.adam_steps}
        for index, owned in enumerate(self.owned):
            tensors = dict(owned.state)
            if owned.main.dtype != owned.parameter.dtype:
                tensors["main"] = owned.main
            for name, tensor in tensors.items():
                sharded = make_sharded_optimizer_tensor(entries[index], tensor, prefix=f"optimizer.{name}")
                state[f"{name}.{index}"] = _as_only_data_replica(sharded)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a loaded state."""
        self.adam_steps = int(state["adam_steps"])
        for index, owned in enumerate(self.owned):
            for name, tensor in {**owned.state, "main": owned.main}.items():
                if f"{name}.{index}" in state:
                    tensor.copy_(state[f"{name}.{index}"])

    def host_movable(self) -> list[Tensor]:
        """Moments, and main weights that are not the model's own."""
        tensors = [tensor for owned in self.owned for tensor in owned.state.values()]
        return tensors + [owned.main for owned in self.owned if owned.main.dtype != owned.parameter.dtype]

    def _grad_norm(self) -> float:
        grads = [
            p.main_grad
            for p in self.parameters
            if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p, self.tensor_parallel)
        ]
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        if grads:
            square = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        else:
            square = torch.zeros((), dtype=torch.float64, device=device)
        if self.model_parallel.size() > 1:
            dist.all_reduce(square, group=self.model_parallel)
        return math.sqrt(value) if (value := square.item()) == value else math.nan

    def _step_matrices(self, owned: Sequence[Owned], lr: float) -> None:
        if not owned:
            return
        buffers = [entry.state["momentum"] for entry in owned]
        grads = [entry.grad for entry in owned]
        momentum = self.options.muon_momentum
        torch._foreach_lerp_(buffers, grads, 1.0 - momentum)
        updates = self._orthogonal_updates(owned, torch._foreach_lerp(grads, buffers, momentum))
        mains = [entry.main for entry in owned]
        if self.options.weight_decay:
            torch._foreach_mul_(mains, 1.0 - lr * self.options.weight_decay)
        torch._foreach_add_(mains, updates, alpha=-lr)

    def _orthogonal_updates(self, owned: Sequence[Owned], nesterov: Sequence[Tensor]) -> list[Tensor]:
        """Local shards of the orthogonalised, RMS-matched updates, fp32."""
        size, rank = self.tensor_parallel.size(), self.tensor_parallel.rank()
        wholes: dict[int, Tensor] = {}
        for index, (entry, local) in enumerate(zip(owned, nesterov, strict=True)):
            assert entry.layout is not None
            if size == 1 or entry.layout.partition_dim is None:
                wholes[index] = local
                continue
            keeper = index % size
            shards = [torch.empty_like(local) for _ in range(size)] if rank == keeper else None
            dist.gather(
                local, shards, dst=dist.get_global_rank(self.tensor_parallel, keeper), group=self.tensor_parallel
            )
            if shards is not None:
                wholes[index] = entry.layout.join(shards)
        computed = self._orthogonalise_wholes(owned, wholes)
        updates = []
        for index, (entry, local) in enumerate(zip(owned, nesterov, strict=True)):
            assert entry.layout is not None
            if size == 1 or entry.layout.partition_dim is None:
                updates.append(computed[index])
                continue
            keeper = index % size
            out = torch.empty_like(local)
            parts = None
            if rank == keeper:
                parts = [entry.layout.cut(computed[index], size, shard).contiguous() for shard in range(size)]
            dist.scatter(out, parts, src=dist.get_global_rank(self.tensor_parallel, keeper), group=self.tensor_parallel)
            updates.append(out)
        return updates

    def _orthogonalise_wholes(self, owned: Sequence[Owned], wholes: dict[int, Tensor]) -> dict[int, Tensor]:
        """Each whole weight's update; computed in the model's own precision."""
        layouts: dict[int, Layout] = {}
        pieces: list[Tensor] = []
        spans: dict[int, slice] = {}
        for index, whole in wholes.items():
            layout = owned[index].layout
            assert layout is not None
            layouts[index] = layout
            matrices = layout.matrices(whole.to(owned[index].parameter.dtype))
            spans[index] = slice(len(pieces), len(pieces) + len(matrices))
            pieces.extend(matrices)
        scaled = [
            result.float() * (RMS_OF_ADAMW * math.sqrt(max(result.shape))) for result in orthogonalise_all(pieces)
        ]
        return {index: layouts[index].fuse(scaled[spans[index]]) for index in wholes}

    def _step_adamw(self, owned: Sequence[Owned], lr: float, weight_decay: float) -> None:
        if not owned:
            return
        mains = [entry.main for entry in owned]
        torch._fused_adamw_(
            mains,
            [entry.grad for entry in owned],
            [entry.state["exp_avg"] for entry in owned],
            [entry.state["exp_avg_sq"] for entry in owned],
            [],
            [torch.full((), float(self.adam_steps), device=main.device) for main in mains],
            lr=lr,
            beta1=self.options.adam_beta1,
            beta2=self.options.adam_beta2,
            weight_decay=weight_decay,
            eps=self.options.adam_eps,
            amsgrad=False,
            maximize=False,
        )


def update_cost(parameter: Tensor, layout: Layout | None) -> float:
    """Arithmetic of one update of this shard, roughly."""
    if layout is None:
        return 20.0 * parameter.numel()
    rows, columns = sorted(parameter.shape)
    return float(STEPS) * (4.0 * rows * rows * columns + 2.0 * rows**3)


def layout_of(name: str, parameter: Tensor, transformer: Any, tensor_parallel: int) -> Layout | None:
    """Layout of a weight that Muon updates; None where AdamW does (embeddings, head, norms, biases, patch filter)."""
    tail = name.rsplit(".", 2)[-2]
    if parameter.ndim != 2 or tail in ("word_embeddings", "output_layer"):
        return None
    sharded = getattr(parameter, "tensor_model_parallel", False)
    dim = parameter.partition_dim if sharded and tensor_parallel > 1 else None
    if tail == "linear_qkv":
        groups = transformer.num_query_groups
        return Layout(dim, (transformer.num_attention_heads // groups, 1, 1), groups)
    if tail == "linear_fc1":
        return Layout(dim, (1, 1), tensor_parallel)
    if tail == "qkv":
        return Layout(dim, (1, 1, 1), 1)
    return Layout(dim)


def _as_only_data_replica(sharded: ShardedTensor | ShardedTensorFactory) -> ShardedTensor | ShardedTensorFactory:
    """Only the owner holds this state, whichever data-parallel rank it is: make its copy the one that is written."""
    replica = sharded.replica_id
    sharded.replica_id = (*replica[:-1], 0) if isinstance(replica, tuple) else 0
    return sharded
