"""Which version of an op runs: chosen by name, or by where the tensors live."""

from __future__ import annotations

import contextlib
import os
import sys

import torch
from torch import Tensor


def resolve(backend: str | None, tensor: Tensor, known: tuple[str, ...] = ("torch", "triton")) -> str:
    """The backend to run for `tensor`: the named one, else Triton on CUDA and torch elsewhere."""
    if backend is None:
        return "triton" if tensor.is_cuda else "torch"
    if backend not in known:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(known)}, or None")
    if backend != "torch" and not tensor.is_cuda and not interpreting():
        raise ValueError(
            f"backend={backend!r} on a {tensor.device.type} tensor: set TRITON_INTERPRET=1 before the start"
        )
    return backend


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels started within go to the tensor's GPU, whichever is current; nothing elsewhere."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def aligned(values: Tensor) -> Tensor:
    """The values contiguous and at an address of whole 16 bytes: for any other Triton compiles a second kernel."""
    values = values.contiguous()
    return values.clone() if values.data_ptr() % 16 else values


def interpreting() -> bool:
    """Whether Triton kernels run (or would run) in its interpreter."""
    if "triton" in sys.modules:
        return bool(sys.modules["triton"].knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
