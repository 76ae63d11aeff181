"""The three matrix products of a vocabulary head, all accumulated in fp32 (fp64 for fp64 inputs).

16-bit operands go to cuBLAS as they are, with fp32 results; where the library cannot do that (CPU), slabs of the
weight are widened one at a time, so that no second copy of the weight is ever made.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SLAB_ELEMENTS = 1 << 20
"""Elements of a widened slab: 4 MiB in fp32."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type logits, statistics and sums are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_into(out_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
    """out = hidden x weight^T."""
    if hidden_CH.dtype == weight_VH.dtype == out_CV.dtype:
        torch.mm(hidden_CH, weight_VH.t(), out=out_CV)
    elif mixed(hidden_CH, weight_VH):
        torch.mm(hidden_CH, weight_VH.t(), out_dtype=out_CV.dtype, out=out_CV)
    else:
        wide_CH = hidden_CH.to(out_CV.dtype)
        for rows in slabs(weight_VH):
            torch.mm(wide_CH, weight_VH[rows].to(out_CV.dtype).t(), out=out_CV[:, rows])


def hidden_grad_into(out_CH: Tensor, dlogits_CV: Tensor, weight_VH: Tensor) -> None:
    """out = dlogits x weight."""
    if dlogits_CV.dtype == weight_VH.dtype == out_CH.dtype:
        torch.mm(dlogits_CV, weight_VH, out=out_CH)
    elif mixed(dlogits_CV, weight_VH):
        torch.mm(dlogits_CV, weight_VH, out_dtype=out_CH.dtype, out=out_CH)
    else:
        out_CH.zero_()
        for rows in slabs(weight_VH):
            out_CH.addmm_(dlogits_CV[:, rows].to(out_CH.dtype), weight_VH[rows].to(out_CH.dtype))


def weight_grad_into(sum_VH: Tensor, dlogits_CV: Tensor, hidden_CH: Tensor, add: bool) -> None:
    """sum (+)= dlogits^T x hidden."""
    if dlogits_CV.dtype == hidden_CH.dtype == sum_VH.dtype:
        if add:
            sum_VH.addmm_(dlogits_CV.t(), hidden_CH)
        else:
            torch.mm(dlogits_CV.t(), hidden_CH, out=sum_VH)
    elif mixed(dlogits_CV, hidden_CH):
        if not add:
            torch.mm(dlogits_CV.t(), hidden_CH, out_dtype=sum_VH.dtype, out=sum_VH)
        elif _accumulates_in_place(sum_VH.device, hidden_CH.dtype):
            torch.addmm(sum_VH, dlogits_CV.t(), hidden_CH, out_dtype=sum_VH.dtype, out=sum_VH)
        else:
            for rows in slabs(sum_VH, 1 << 25):
                sum_VH[rows] += torch.mm(dlogits_CV[:, rows].t(), hidden_CH, out_dtype=sum_VH.dtype)
    else:
        wide_CH = hidden_CH.to(sum_VH.dtype)
        for rows in slabs(sum_VH):
            part_CV = dlogits_CV[:, rows].to(sum_VH.dtype)
            if add:
                sum_VH[rows].addmm_(part_CV.t(), wide_CH)
            else:
                torch.mm(part_CV.t(), wide_CH, out=sum_VH[rows])


def mixed(left: Tensor, right: Tensor) -> bool:
    """Whether the library multiplies these 16-bit operands into a wide result."""
    return left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)


def slabs(weight_VH: Tensor, elements: int = SLAB_ELEMENTS) -> list[slice]:
    """Rows of a weight in parts of about so many elements."""
    rows = max(16, elements // max(1, weight_VH.shape[1]))
    return [slice(a, min(a + rows, weight_VH.shape[0])) for a in range(0, weight_VH.shape[0], rows)]


@functools.cache
def _accumulates_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Some releases ignore `out=` or the sum's values in a widening addmm: try it once on known numbers."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.full((16, 16), 3.0, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, ones.t(), ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 19.0).all())
