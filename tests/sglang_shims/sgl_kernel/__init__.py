"""Test only: stands in for SGLang's compiled kernels, so that sglang 0.5.23 imports on a machine without CUDA.

It holds no implementation. SGLang asks whether `convert_weight_packed` exists and, as it doesn't, computes with plain
torch; a few operator schemas are looked up while modules load; anything else raises when called.
"""

import torch

__version__ = "0.0.0"

_library = torch.library.Library("sgl_kernel", "DEF")
for _operator in (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
):
    _library.define(f"{_operator}(Tensor x) -> Tensor")


def __getattr__(name):
    """A callable that says it isn't there."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU stand-in")

    missing.__name__ = name
    return missing
