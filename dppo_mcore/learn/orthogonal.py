"""Newton-Schulz orthogonalisation, and which true matrices a (possibly fused, possibly sharded) weight holds.

A local weight is gathered whole, cut into its matrices (query, key, value; gate, up), and the results are put back
together and cut again: the update doesn't depend on the tensor-parallel size. O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
BATCH_ELEMENTS = 1 << 22
"""Matrices of one shape are orthogonalised together up to this many elements."""


def orthogonalise(matrices_BOI: Tensor) -> Tensor:
    """Every matrix of the batch with its singular values moved to about 1 (quintic Newton-Schulz, five steps)."""
    tall = matrices_BOI.shape[1] > matrices_BOI.shape[2]
    x = matrices_BOI.mT if tall else matrices_BOI
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp_min(1e-7).to(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        mix = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, mix, x, beta=a)
    return x.mT if tall else x


def orthogonalise_all(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalise` for matrices of mixed shapes; equal shapes go through in batches."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(matrix.shape), []).append(index)
    results: list[Tensor | None] = [None] * len(matrices)
    for shape, indices in by_shape.items():
        size = max(1, BATCH_ELEMENTS // (shape[0] * shape[1]))
        for first in range(0, len(indices), size):
            some = indices[first : first + size]
            for index, result in zip(some, orthogonalise(torch.stack([matrices[i] for i in some])), strict=True):
                results[index] = result
    return [result for result in results if result is not None]


@dataclass(frozen=True)
class Layout:
    """How a local weight relates to its whole matrices."""

    partition_dim: int | None = None
    """Dimension sharded over tensor-parallel ranks; None is replicated."""
    parts: tuple[int, ...] = (1,)
    """Row shares of the fused matrices within one repeat: (heads per group, 1, 1) for QKV, (1, 1) for gate and up."""
    repeats: int = 1
    """How often the parts alternate in the whole weight: query groups for QKV, shards for gate and up."""

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole weight from the ranks' shards."""
        return shards[0] if self.partition_dim is None else torch.cat(list(shards), self.partition_dim)

    def cut(self, whole_OI: Tensor, shards: int, rank: int) -> Tensor:
        """A rank's shard of the whole weight."""
        return whole_OI if self.partition_dim is None else whole_OI.chunk(shards, self.partition_dim)[rank]

    def matrices(self, whole_OI: Tensor) -> list[Tensor]:
        """The true matrices inside the weight."""
        if len(self.parts) == 1:
            return [whole_OI]
        rows = whole_OI.shape[0] // self.repeats
        unit = rows // sum(self.parts)
        grouped = whole_OI.reshape(self.repeats, rows, whole_OI.shape[1])
        pieces = grouped.split([share * unit for share in self.parts], dim=1)
        return [piece.reshape(-1, whole_OI.shape[1]) for piece in pieces]

    def fuse(self, matrices: Sequence[Tensor]) -> Tensor:
        """The weight from its matrices."""
        if len(self.parts) == 1:
            return matrices[0]
        columns = matrices[0].shape[1]
        pieces = [matrix.reshape(self.repeats, -1, columns) for matrix in matrices]
        return torch.cat(pieces, dim=1).reshape(-1, columns)
