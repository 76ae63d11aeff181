"""A 64-bit fingerprint of a tensor that adds up over its shards.

Every element's bits, as an integer, are multiplied with a weight that depends on its row and column in the *full*
tensor, and summed modulo 2**64. So the shards' fingerprints, taken anywhere (a trainer's rank, an engine's rank, a
bucket), sum to the full tensor's, whatever the layouts on both sides; a moved, missing or changed element shows.
Runs in the engine's environment too: torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


def _mix(start: int, count: int, salt: int, device: torch.device) -> Tensor:
    """Odd pseudo-random int64 weights [count] of indices start, start+1, ... (splitmix64)."""
    x = torch.arange(start, start + count, dtype=torch.int64, device=device) * -7046029254386353131 + salt
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return (x ^ (x >> 31)) | 1


def fingerprint(shard: Tensor, row: int = 0, column: int = 0) -> int:
    """Fingerprint in [-2**63, 2**63) of a shard whose first element sits at (row, column) of the full tensor.

    A tensor of more than two dimensions counts as [first, all others]; one of one dimension as a column.
    """
    if not shard.numel():
        return 0
    matrix_RC = shard.detach().reshape(shard.shape[0], -1) if shard.dim() > 1 else shard.detach().reshape(-1, 1)
    rows, columns = matrix_RC.shape
    bits_RC = matrix_RC.view(_BITS[matrix_RC.element_size()])
    column_weights_C = _mix(column, columns, 0x5851F42D4C957F2D, shard.device)
    row_weights_R = _mix(row, rows, 0x14057B7EF767814F, shard.device)
    total = torch.zeros((), dtype=torch.int64, device=shard.device)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        sums_R = (bits_RC[first : first + step].to(torch.int64) * column_weights_C).sum(1)
        total += (sums_R * row_weights_R[first : first + step]).sum()
    return int(total)


def add(left: int, right: int) -> int:
    """Sum of two fingerprints, wrapped to int64."""
    return (left + right + (1 << 63)) % (1 << 64) - (1 << 63)
