"""Process groups: from torchrun's environment or a single process to Megatron's parallel state."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from dppo_mcore.runtime import device

if TYPE_CHECKING:
    from dppo_mcore.config import ParallelConfig


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun set them; (0, 1) for plain python."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start(parallel: ParallelConfig, seed: int) -> None:
    """Join the job's process group and lay Megatron's groups over it."""
    device.install()
    if not dist.is_initialized():
        rank, world = world_from_environment()
        timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
        if world == 1 and "MASTER_PORT" not in os.environ:
            dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(device.backend(), rank=rank, world_size=world, timeout=timeout)
    reinit(parallel, seed)


def reinit(parallel: ParallelConfig, seed: int) -> None:
    """Lay Megatron's groups anew over a living process group, and seed every generator."""
    from megatron.core import parallel_state

    _drop_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=int(max(1, parallel.distributed_timeout_minutes)),
        create_gloo_process_groups=True,
    )
    seed_everything(seed)


def _drop_groups() -> None:
    """End all groups but the world: Megatron forgets its groups without ending them, and each holds threads."""
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's tensor-parallel generators."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Leave Megatron's groups and the process group."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
