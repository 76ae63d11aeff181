"""The chunked walk over a vocabulary head that both log-prob ops share.

Valid rows are compacted first, then taken in chunks whose logits fit the workspace. A product always has at
least 128 rows, in sixteens (the last chunk is padded with zero rows): a row's value then does not depend on which rows
surround it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from dppo_kernels import products
from dppo_kernels.head_rows import RowStats
from dppo_kernels.vocab import VocabShard

ROW_QUANTUM = 128
FIXED_BYTES = 12 << 20
"""Set aside from the workspace for row tiles and widened slabs."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Chunk:
    """Rows `first .. first + rows` of the compacted input; P is `rows` padded with zero rows."""

    first: int
    rows: int
    hidden_PH: Tensor
    targets_C: Tensor
    logits_PV: Tensor

    @property
    def here(self) -> slice:
        return slice(self.first, self.first + self.rows)


class Head:
    """One call's view of hidden states, weight and targets, with its scratch memory."""

    def __init__(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        rows_n: Tensor | None,
        shard: VocabShard,
        temperature: float,
        workspace_mib: float,
        versions: ModuleType,
    ) -> None:
        self.hidden_NH, self.rows_n, self.shard = hidden_NH, rows_n, shard
        self.weight_VH = weight_VH[: shard.columns]
        self.scale = 1.0 / temperature
        self.versions = versions
        self.targets_n = (targets_N if rows_n is None else targets_N.index_select(0, rows_n)).to(torch.int64)
        self.count = self.targets_n.shape[0]
        self.dtype = products.accumulator(hidden_NH.dtype)
        self.limit = self._chunk_rows(workspace_mib)
        self._buffers: dict[str, Tensor] = {}

    def _chunk_rows(self, workspace_mib: float) -> int:
        """Rows whose logits fit the workspace. Every chunk has collectives, so all ranks must come to the same number:
        the columns are those of an even share, not this rank's own."""
        wide, narrow = self.dtype.itemsize, self.hidden_NH.dtype.itemsize
        width = self.hidden_NH.shape[1]
        per_row = wide * (_padded(self.shard.share) + width + 8 * self.shard.world) + 2 * narrow * width
        budget = workspace_mib * 2**20
        budget = max(budget - FIXED_BYTES, budget / 2)
        return max(1, int(budget / per_row / ROW_QUANTUM)) * ROW_QUANTUM

    def spans(self) -> list[Span]:
        """Chunks of about equal size; without a valid row one empty chunk, so that ranks of a group stay in step."""
        pieces = max(1, -(-self.count // self.limit))
        size = _quantum(-(-self.count // pieces))
        return [(a, min(a + size, self.count)) for a in range(0, max(1, self.count), max(1, size))]

    def logits(self, span: Span) -> Chunk:
        """Gather a chunk's rows and multiply them with the weight."""
        first, rows = span[0], span[1] - span[0]
        padded = _filled(rows)
        width = self.hidden_NH.shape[1]
        if self.rows_n is None and padded == rows and self.hidden_NH.stride(1) == 1:
            hidden_PH = self.hidden_NH[first : first + rows]
        else:
            hidden_PH = self._buffer("hidden", padded, width, self.hidden_NH.dtype)
            if self.rows_n is None:
                hidden_PH[:rows].copy_(self.hidden_NH[first : first + rows])
            else:
                torch.index_select(self.hidden_NH, 0, self.rows_n[first : first + rows], out=hidden_PH[:rows])
            hidden_PH[rows:].zero_()
        columns = self.weight_VH.shape[0]
        logits_PV = self._buffer("logits", padded, _padded(columns), self.dtype)[:, :columns]
        products.logits_into(logits_PV, hidden_PH, self.weight_VH)
        return Chunk(first, rows, hidden_PH, self.targets_n[first : first + rows], logits_PV)

    def stats(self, chunk: Chunk, entropy: bool, keep: bool) -> tuple[RowStats, Tensor]:
        """Statistics of a chunk's rows over all ranks, and this rank's own row maxima."""
        logits_CV = chunk.logits_PV[: chunk.rows]
        mine_4C = self.versions.chunk_stats(logits_CV, chunk.targets_C, self.shard, self.scale, entropy, keep)
        return self.versions.combine(self.shard.gather(mine_4C)), mine_4C[0]

    def backward(
        self,
        chunk: Chunk,
        stats: RowStats,
        grad_logprob_C: Tensor | None,
        grad_entropy_C: Tensor | None,
        grad_hidden_NH: Tensor | None,
        weight_grad: WeightGrad | None,
        kept_max_C: Tensor | None = None,
    ) -> None:
        """From gradients of a chunk's rows to those of hidden states and weight."""
        chunk.logits_PV[chunk.rows :].zero_()
        dlogits_PV = self.versions.chunk_grads(
            chunk.logits_PV,
            chunk.targets_C,
            self.shard,
            self.scale,
            stats,
            grad_logprob_C,
            grad_entropy_C,
            kept_max_C,
            self.weight_VH.dtype,
        )
        pending = None
        if grad_hidden_NH is not None:
            grad_PH = self._buffer("grad_hidden", len(dlogits_PV), self.hidden_NH.shape[1], self.dtype)
            products.hidden_grad_into(grad_PH, dlogits_PV, self.weight_VH)
            if self.shard.group is not None:
                pending = dist.all_reduce(grad_PH, group=self.shard.group, async_op=True)
        if weight_grad is not None:
            weight_grad.add(dlogits_PV, chunk.hidden_PH)
        if grad_hidden_NH is not None:
            if pending is not None:
                pending.wait()
            if self.rows_n is None:
                grad_hidden_NH[chunk.here].copy_(grad_PH[: chunk.rows])
            else:
                grad_hidden_NH.index_copy_(0, self.rows_n[chunk.here], grad_PH[: chunk.rows].to(grad_hidden_NH.dtype))

    def _buffer(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Scratch of the largest chunk, made once."""
        held = self._buffers.get(name)
        if held is None or held.shape[0] < rows:
            most = max(rows, min(self.limit, _filled(self.count)))
            held = self._buffers[name] = torch.empty(most, width, dtype=dtype, device=self.hidden_NH.device)
        return held[:rows]


class WeightGrad:
    """The weight's gradient, summed over chunks in fp32: into a buffer of its own, or right into `main_grad`."""

    def __init__(self, weight_VH: Tensor, columns: int, into: Tensor | None = None) -> None:
        self._started = into is not None
        if into is None:
            into = torch.empty(weight_VH.shape, dtype=products.accumulator(weight_VH.dtype), device=weight_VH.device)
            into[columns:].zero_()
        self.sum_VH = into
        self._columns = columns

    def add(self, dlogits_PV: Tensor, hidden_PH: Tensor) -> None:
        """Add a chunk's share."""
        products.weight_grad_into(self.sum_VH[: self._columns], dlogits_PV, hidden_PH, add=self._started)
        self._started = True


def deliver(weight_VH: Tensor, sum_VH: Tensor, factor: Tensor | None) -> Tensor | None:
    """Hand over a finished weight gradient, times `factor`: to `main_grad` where the weight has one, else to autograd.

    With `main_grad` the gradient autograd sees is zero, there only so that hooks on the parameter still run.
    """
    main_grad = getattr(weight_VH, "main_grad", None)
    if main_grad is None:
        return _scaled(sum_VH, factor, weight_VH.dtype)
    if sum_VH is not main_grad:
        if factor is not None and main_grad.dtype == sum_VH.dtype:
            torch.addcmul(main_grad, sum_VH, factor.to(sum_VH.dtype), out=main_grad)
        else:
            main_grad.add_(sum_VH if factor is None else sum_VH.mul_(factor))
    if not hasattr(weight_VH, "grad_added_to_main_grad"):
        return None
    weight_VH.grad_added_to_main_grad = True
    return torch.zeros_like(weight_VH)


def _scaled(sum_VH: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sum x factor in another type: one pass over the memory, in slabs where the library would make a wide copy."""
    if factor is None:
        return sum_VH.to(dtype)
    if sum_VH.dtype == dtype:
        return sum_VH.mul_(factor)
    scaled_VH = torch.empty_like(sum_VH, dtype=dtype)
    for rows in products.slabs(sum_VH, 1 << 24):
        torch.mul(sum_VH[rows], factor, out=scaled_VH[rows])
    return scaled_VH


def accumulates_directly(weight_VH: Tensor) -> bool:
    """Whether the weight has a `main_grad` wide enough to sum into."""
    main_grad = getattr(weight_VH, "main_grad", None)
    return main_grad is not None and main_grad.dtype == products.accumulator(weight_VH.dtype)


def valid_rows(valid_N: Tensor, count: int | None = None) -> Tensor | None:
    """Indices of the valid rows, None when all are. With their `count` a GPU need not be waited for."""
    if count is not None and not valid_N.is_cuda and int(valid_N.sum()) != count:
        raise ValueError(f"valid_count={count}: {int(valid_N.sum())} of {valid_N.shape[0]} rows count")
    if count == valid_N.shape[0]:
        return None
    if count is not None:
        return torch.nonzero_static(valid_N, size=count)[:, 0]
    rows_n = valid_N.nonzero()[:, 0]
    return None if rows_n.shape[0] == valid_N.shape[0] else rows_n


def versions(backend: str) -> ModuleType:
    """The module that holds the row kernels of a backend."""
    if backend == "torch":
        from dppo_kernels import head_rows

        return head_rows
    from dppo_kernels import head_rows_triton

    return head_rows_triton


def check_inputs(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float) -> None:
    """Shapes and types, one line each."""
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden_NH.shape)} and weight {tuple(weight_VH.shape)}: expected [N, H] and [V, H] of one H"
        )
    if targets_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"targets {tuple(targets_N.shape)}: expected [{hidden_NH.shape[0]}], one id per hidden row")
    if targets_N.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets are {targets_N.dtype}: expected int32 or int64 ids")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: it must be positive")


def _quantum(rows: int) -> int:
    return -(-rows // ROW_QUANTUM) * ROW_QUANTUM


def _filled(rows: int) -> int:
    """Rows of a product: never so few that a library turns to another way of summing."""
    return max(ROW_QUANTUM, -(-rows // 16) * 16)


def _padded(columns: int) -> int:
    """Row pitch of the logits: whole 64-byte lines, so that rows stay aligned for odd vocabularies."""
    return -(-max(1, columns) // 16) * 16
