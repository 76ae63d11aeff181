"""The optimizer behind one small interface: AdamW by Megatron's distributed optimizer, or our Muon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from dppo_mcore.config import Config


class Optimizer(Protocol):
    """What the step, the checkpoint and the offloader need of an optimizer."""

    def step(self, lr: float, clip: float) -> tuple[float, bool]:
        """Clip to norm `clip` (0: don't) and update; (gradient norm, whether it was finite and applied)."""
        ...

    def reset(self) -> None:
        """Forget moments and step counts."""
        ...

    def reload_model_params(self) -> None:
        """Take fp32 main weights from the model again."""
        ...

    def sharded_state_dict(self, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
        """State for a distributed checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a loaded state."""
        ...

    def host_movable(self) -> list[Tensor]:
        """Tensors whose storage may move to the host between phases (main weights and moments)."""
        ...


def make_optimizer(config: Config, chunks: Sequence[DistributedDataParallel]) -> Optimizer:
    """The optimizer named in the configuration."""
    if config.optimizer.optimizer == "muon":
        from dppo_mcore.learn.muon import Muon

        return Muon(config, chunks)
    return AdamW(config, chunks)


class AdamW:
    """Megatron's distributed optimizer: moments and fp32 main weights sharded over data-parallel ranks."""

    def __init__(self, config: Config, chunks: Sequence[DistributedDataParallel]) -> None:
        self.options = options = config.optimizer
        bf16 = config.model.dtype == "bf16"
        self.inner = get_megatron_optimizer(
            MegatronConfig(
                optimizer="adam",
                lr=1.0,
                weight_decay=options.weight_decay,
                adam_beta1=options.adam_beta1,
                adam_beta2=options.adam_beta2,
                adam_eps=options.adam_eps,
                clip_grad=options.clip_grad,
                use_distributed_optimizer=True,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
            ),
            list(chunks),
        )
        chained: list[DistributedOptimizer] = list(getattr(self.inner, "chained_optimizers", [self.inner]))
        self.shards = [shard for shard in chained if shard.optimizer is not None]
        for shard in self.shards:
            if isinstance(shard.optimizer, torch.optim.AdamW):
                for group in shard.optimizer.param_groups:
                    group["fused"] = True

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> tuple[float, bool]:
        """One AdamW step on this rank's shard, then the all-gather of updated weights."""
        for group in self.inner.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            # The rest too: Megatron leaves wd_mult to a scheduler of its own, and a checkpoint brings what it was
            # written with.
            group["weight_decay"] = self.options.weight_decay * group.get("wd_mult", 1.0)
            group["betas"] = (self.options.adam_beta1, self.options.adam_beta2)
            group["eps"] = self.options.adam_eps
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not math.isfinite(norm):
            return norm, False
        if clip > 0 and norm > clip:
            for shard in self.shards:
                clip_grad_by_total_norm_fp32(shard.get_parameters(), clip, norm)
        self.inner.step_with_ready_grads()
        return norm, True

    @torch.no_grad()
    def reset(self) -> None:
        """Forget moments and step counts."""
        for shard in self.shards:
            for entry in shard.optimizer.state.values():
                for tensor in entry.values():
                    tensor.zero_()
            for group in shard.optimizer.param_groups:
                group.pop("step", None)

    def _fill_state(self) -> None:
        """Zero moments where no step has made any yet: a checkpoint holds them from the start."""
        for shard in self.shards:
            counted_per_parameter = isinstance(shard.optimizer, torch.optim.AdamW)
            for group in shard.optimizer.param_groups:
                for parameter in group["params"]:
                    entry = shard.optimizer.state[parameter]
                    for name in ("exp_avg", "exp_avg_sq"):
                        entry.setdefault(name, torch.zeros_like(parameter))
                    if counted_per_parameter:
                        entry.setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device))

    def reload_model_params(self) -> None:
        """Take fp32 main weights from the model again."""
        self.inner.reload_model_params()

    def sharded_state_dict(self, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
        """Megatron's fully reshardable format."""
        self._fill_state()
        return self.inner.sharded_state_dict(
            model_state, is_loading=loading, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a loaded state; Megatron shares one step counter among parameters, which here get their own."""
        for shard in self.shards:
            shard._set_main_param_and_optimizer_states = partial(_set_parameter_state, shard)
        self.inner.load_state_dict(state)
        for shard in self.shards:
            for entry in shard.optimizer.state.values():
                if "step" in entry:
                    entry["step"] = torch.as_tensor(entry["step"]).clone()

    def host_movable(self) -> list[Tensor]:
        """Moments, and main weights that are not the model's own."""
        tensors: list[Tensor] = []
        for shard in self.shards:
            for group in shard.shard_fp32_from_float16_groups:
                tensors.extend(parameter for parameter in group if parameter is not None)
            for entry in shard.optimizer.state.values():
                tensors.extend(entry[name] for name in ("exp_avg", "exp_avg_sq") if name in entry)
        return tensors


@torch.no_grad()
def _set_parameter_state(shard: DistributedOptimizer, model_parameter: Tensor, loaded: Mapping[str, Tensor]) -> None:
    """Megatron's own version asks a checkpoint for torch AdamW's step counter, which it keeps elsewhere."""
    group, order = shard.model_param_group_index_map[model_parameter]
    main = shard.optimizer.param_groups[group]["params"][order]
    for name, tensor in {"param": main, **shard.optimizer.state[main]}.items():
        if name != "step":
            tensor.copy_(loaded[name])
