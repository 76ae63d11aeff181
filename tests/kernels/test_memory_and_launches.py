"""What is allocated, what is launched, what may recompile, and offsets past 2^31."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import bench_common
import pytest
import torch
from dppo_kernels import group_advantages, head_rows_triton, linear_logprob, linear_policy_loss, policy_loss
from dppo_kernels.head_rows import RowStats
from dppo_kernels.vocab import VocabShard
from live_memory import LiveMemory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.kernels.oracle import BACKENDS, DEVICE, head_case

ROWS, WIDTH, VOCAB = 1024, 32, 4000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_logits_are_never_whole(backend: str, level: str) -> None:
    if backend == "triton" and DEVICE == "cpu" and level == "sequence":
        pytest.skip("as at token level, and slow under the interpreter")
    hidden, weight, targets = head_case(ROWS, WIDTH, VOCAB, masked=0.0)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    assert ROWS > 2 * WIDTH
    old = torch.full((ROWS,), -8.0, device=DEVICE)
    mask = torch.arange(ROWS, device=DEVICE) % 4 == 0 if backend == "triton" else torch.ones(ROWS, device=DEVICE)
    bounds = torch.tensor([0, 900, ROWS], device=DEVICE)
    with LiveMemory() as memory:
        loss, _ = linear_policy_loss(
            hidden, weight, targets, old, old, mask, level=level, cu_seqlens=bounds, workspace_mib=4, backend=backend
        )
        loss.backward()
    outputs = (hidden.numel() + weight.numel()) * 4
    per_row = 32 * 4 * ROWS
    assert memory.largest_elements < ROWS * VOCAB / 2
    assert memory.peak_bytes <= 4 * 2**20 + outputs + per_row
    with LiveMemory() as memory:
        value, entropy = linear_logprob(
            hidden, weight, torch.where(mask != 0, targets, -1), entropy=True, workspace_mib=4, backend=backend
        )
        (value.sum() + entropy.sum()).backward()
    assert memory.largest_elements < ROWS * VOCAB / 2
    assert memory.peak_bytes <= 4 * 2**20 + outputs + per_row


class Operations(TorchDispatchMode):
    """Names the torch operations that would be kernels on a GPU: all but views and bare allocations."""

    FREE = ("empty", "view", "detach", "select", "slice", "alias", "as_strided", "expand", "t.", "unbind")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def interpreted() -> Iterator[list[list[int]]]:
    """Addresses given to every kernel the interpreter starts within."""
    from triton.runtime.interpreter import GridExecutor

    started: list[list[int]] = []
    real = GridExecutor.__call__

    def record(executor: Any, *args: Any, **kwargs: Any) -> None:
        started.append([value.data_ptr() for value in args if isinstance(value, Tensor)])
        with _disable_current_modes():  # it copies arguments to and fro
            real(executor, *args, **kwargs)

    GridExecutor.__call__ = record
    try:
        yield started
    finally:
        GridExecutor.__call__ = real


def launches(work: Callable[[], Any]) -> int:
    """Kernels a call starts, Triton's and torch's; the first call is a warm-up."""
    if DEVICE == "cuda":
        return bench_common.launches(work)
    work()
    with interpreted() as started, Operations() as others:
        work()
    assert not others.names, others.names
    return len(started)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_loss_takes_two_launches_and_advantages_one(level: str) -> None:
    new = torch.randn(3000, device=DEVICE, requires_grad=True)
    rest = [torch.randn(3000, device=DEVICE) for _ in range(2)]
    mask = rest[0] > 0
    bounds, upstream = torch.tensor([0, 1000, 3000], device=DEVICE), torch.ones((), device=DEVICE)

    def learn() -> None:
        new.grad = None
        loss, _ = policy_loss(
            new, *rest, mask, ref_logprobs=rest[0], rollout_logprobs=rest[1], tis_cap=2.0, kl_coef=0.1, dual_clip=3.0,
            level=level, cu_seqlens=bounds, backend="triton",
        )  # fmt: skip
        loss.backward(upstream)

    assert launches(learn) == 2
    rewards, ids = rest[0][:40], torch.arange(40, device=DEVICE) % 8
    assert launches(lambda: group_advantages(rewards, ids, backend="triton")) == 1


def test_pointers_stay_aligned_so_that_nothing_recompiles() -> None:
    if DEVICE != "cpu":
        pytest.skip("the interpreter shows the arguments")
    hidden, weight, targets = head_case(140, 16, 97, masked=0.0)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    bounds = torch.tensor([0, 3, 127, 129, 140])
    columns = [torch.randn(141)[1:] for _ in range(4)]
    mask = torch.ones(141, dtype=torch.bool)[1:]
    with interpreted() as started:
        for level in ("token", "sequence"):
            loss, _ = linear_policy_loss(
                hidden, weight, targets, *columns[:2], mask, level=level, cu_seqlens=bounds, workspace_mib=0.01,
                ref_logprobs=columns[2], rollout_logprobs=columns[3], tis_cap=2.0, backend="triton",
            )  # fmt: skip
            loss.backward()
        value, entropy = linear_logprob(hidden, weight, targets, entropy=True, workspace_mib=0.01, backend="triton")
        (value.sum() + entropy.sum()).backward()
        policy_loss(columns[0], *columns[1:3], mask, backend="triton")
        group_advantages(columns[0][:20], torch.arange(21)[1:] % 7, backend="triton")
    pointers = [pointer for addresses in started for pointer in addresses]
    assert len(pointers) > 50 and all(pointer % 16 == 0 for pointer in pointers)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_host_never_waits_and_graphs_can_be_captured(level: str) -> None:
    if DEVICE != "cuda":
        pytest.skip("needs a CUDA device")
    hidden, weight, targets = head_case(500, 64, 1088, dtype=torch.bfloat16, masked=0.0)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    old, mask = torch.full((500,), -8.0, device=DEVICE), torch.ones(500, dtype=torch.bool, device=DEVICE)
    bounds = torch.tensor([0, 200, 500], device=DEVICE)

    def learn() -> None:
        hidden.grad = weight.grad = None
        loss, _ = linear_policy_loss(hidden, weight, targets, old, old, mask, normalizer=500.0, valid_count=500)
        loss.backward()
        new = linear_logprob(hidden, weight, targets, valid_count=500)[0].detach().requires_grad_()
        policy_loss(new, old, old, mask, level=level, cu_seqlens=bounds)[0].backward()

    learn()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        learn()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    new = torch.zeros(500, device=DEVICE, requires_grad=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = policy_loss(new, old, old, mask, level=level, cu_seqlens=bounds)
    for shift in (-7.5, -9.0):
        with torch.no_grad():
            new.fill_(shift)
        graph.replay()
        assert torch.equal(loss, policy_loss(new, old, old, mask, level=level, cu_seqlens=bounds)[0])


def _rows_far_apart() -> None:
    """Row kernels on rows 2^30 elements apart: the last lies past 2^31 elements; memory is touched only at the rows."""
    pitch, rows, columns = 2**30, 4, 40
    store = torch.empty(pitch * (rows - 1) + 64, device=DEVICE)
    logits = torch.as_strided(store, (rows, columns), (pitch, 1))
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits.copy_(values)
    targets = torch.tensor([3, 7, 11, 39], device=DEVICE)
    shard = VocabShard(0, columns, columns)
    stats = head_rows_triton.combine(
        head_rows_triton.chunk_stats(logits, targets, shard, 1.0, True, False).unsqueeze(0)
    )
    right = torch.log_softmax(values, -1)
    assert torch.allclose(stats.logprob_C, right.gather(1, targets[:, None])[:, 0], atol=1e-5)
    known = RowStats(stats.max_C, stats.sum_C, stats.logprob_C, stats.entropy_C)
    grads = head_rows_triton.chunk_grads(logits, targets, shard, 1.0, known, torch.ones(rows, device=DEVICE), None)
    onehot = torch.nn.functional.one_hot(targets, columns)
    assert torch.allclose(grads, onehot - right.exp(), atol=1e-5)


def test_offsets_past_two_to_the_31() -> None:
    apart(_rows_far_apart)


def apart(check: Callable[[], None]) -> None:
    """Run in a forked child where one is possible: a wrong offset ends a process."""
    if DEVICE == "cuda":
        check()
        return
    child = multiprocessing.get_context("fork").Process(target=check)
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0
