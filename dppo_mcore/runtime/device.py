"""The device as a parameter: the only place that asks whether CUDA is there.

With CUDA everything here is a thin wrapper. Without it, `install()` lets the real megatron-core run on gloo and
CPU tensors: its literal `device="cuda"`, its CUDA RNG states and its device queries are answered with the CPU's.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


def has_cuda() -> bool:
    """Whether this process computes on CUDA."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """This rank's device; one GPU per local rank."""
    if has_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return _CPU


def backend() -> str:
    """Collective backend that goes with the device."""
    return "nccl" if has_cuda() else "gloo"


def count() -> int:
    """Accelerators this process sees; 0 where it computes on the host."""
    return torch.cuda.device_count() if has_cuda() else 0


def synchronize() -> None:
    """Wait for the device's queued work."""
    if has_cuda():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give cached device memory back."""
    if has_cuda():
        torch.cuda.empty_cache()


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Host copy of a tensor from which the device can be filled fastest."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device=_CPU, pin_memory=has_cuda())
    return host.copy_(tensor)


def memory_allocated() -> int:
    """Bytes of device memory in use by tensors (0 where the device doesn't count them)."""
    return torch.cuda.memory_allocated() if has_cuda() else 0


def memory_free() -> int:
    """Bytes of device memory that nobody holds, whoever held them (0 where the device doesn't tell)."""
    return torch.cuda.mem_get_info()[0] if has_cuda() else 0


def peak_flops(dtype: torch.dtype) -> float | None:
    """Dense peak FLOP/s of this device for `dtype`, for MFU; None where no figure is known."""
    if not has_cuda():
        return None
    name = torch.cuda.get_device_name()
    if any(chip in name for chip in ("H100", "H200", "H800", "GH200")):
        return 989e12 if dtype in (torch.bfloat16, torch.float16) else 495e12
    if "A100" in name or "A800" in name:
        return 312e12 if dtype in (torch.bfloat16, torch.float16) else 156e12
    return None


def install() -> None:
    """Make megatron-core run on this machine's device. Idempotent; changes nothing with CUDA."""
    global _installed
    if _installed:
        return
    _installed = True
    if has_cuda():
        torch.cuda.set_device(device())
        return
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from torch import _dynamo

    _dynamo.config.disable = True
    _answer_device_queries()
    _answer_rng_queries()
    _CudaMeansCpu().__enter__()


def _answer_device_queries() -> None:
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.set_device = lambda *_, **__: None
    torch.cuda.empty_cache = lambda *_, **__: None


def _answer_rng_queries() -> None:
    """Megatron's RNG tracker forks the CPU generator instead of a CUDA one."""
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(new_state)

    # It warns whenever the CPU generator moves inside a fork, which is now the point of forking.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state
    torch.cuda.manual_seed = torch.manual_seed


def _names_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Answers megatron-core's CUDA literals with the CPU, and `Tensor.type()` with the names it compares against."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            if name.startswith("torch.") and not name.startswith("torch.cuda."):
                return "torch.cuda." + name[len("torch.") :]
            return name
        return func(*args, **kwargs)
