"""What each rank does in the vocabulary-parallel tests; results go back as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from dppo_kernels import linear_logprob, linear_policy_loss
from torch import Tensor

from tests.kernels.oracle import head_case

_subgroups: dict[tuple[int, ...], Any] = {}


def group_of(size: int) -> tuple[Any, int]:
    """This rank's group of `size` neighbours, and its rank in it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if size == world:
        return dist.group.WORLD, rank
    for first in range(0, world, size):
        members = tuple(range(first, first + size))
        if members not in _subgroups:
            _subgroups[members] = dist.new_group(list(members))
    first = rank // size * size
    return _subgroups[tuple(range(first, first + size))], rank - first


def shard_of(weight: Tensor, lengths: list[int], rank: int) -> tuple[Tensor, int]:
    """A rank's rows of the weight and where they start; rows past the end are padding full of junk."""
    start = sum(lengths[:rank])
    own = weight[start : start + lengths[rank]]
    junk = torch.full((lengths[rank] - len(own), weight.shape[1]), 9.0)
    return torch.cat([own, junk]), start


def logprobs(lengths: list[int], vocab: int, told: bool, backend: str, masked: float = 0.2) -> dict[str, Tensor]:
    """Values and gradients of linear_logprob, the weight spread by `lengths`."""
    group, rank = group_of(len(lengths))
    hidden, weight, targets = head_case(70, 16, vocab, masked=masked)
    shard, start = shard_of(weight, lengths, rank)
    hidden, shard = hidden.requires_grad_(), shard.requires_grad_()
    where: dict[str, Any] = dict(vocab_size=vocab)
    if told:
        where["vocab_start"] = start
    value, entropy = linear_logprob(
        hidden, shard, targets, temperature=0.8, entropy=True, group=group, workspace_mib=0.01, backend=backend, **where
    )
    (value * torch.linspace(-1, 2, 70) + 0.3 * entropy).sum().backward()
    return dict(value=value.detach(), entropy=entropy.detach(), hidden=hidden.grad, weight=shard.grad)


def policy(
    lengths: list[int],
    vocab: int,
    level: str,
    masked: bool,
    backend: str,
    rows: int = 200,
    workspace_mib: float = 0.01,
) -> dict[str, Any]:
    """Loss and gradients of linear_policy_loss, and how many collectives were issued."""
    group, rank = group_of(len(lengths))
    hidden, weight, targets = head_case(rows, 16, vocab)
    shard, start = shard_of(weight, lengths, rank)
    hidden, shard = hidden.requires_grad_(), shard.requires_grad_()
    source = torch.Generator().manual_seed(4)
    old = -4 + torch.randn(rows, generator=source)
    mask = torch.zeros(rows) if masked else (torch.rand(rows, generator=source) < 0.7).float()
    issued = 0
    real = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal issued
        issued += 1
        return real(*args, **kwargs)

    dist.all_reduce = counted
    try:
        loss, metrics = linear_policy_loss(
            hidden, shard, targets, old, torch.randn(rows, generator=source), mask, group=group, vocab_start=start,
            vocab_size=vocab, level=level, cu_seqlens=torch.tensor([0, 3 * rows // 4, rows]),
            workspace_mib=workspace_mib, backend=backend,
        )  # fmt: skip
        loss.backward()
    finally:
        dist.all_reduce = real
    return dict(
        loss=loss.detach(), hidden=hidden.grad, weight=shard.grad, entropy=metrics["entropy"].sum, issued=issued
    )


def outside(lengths: list[int], vocab: int) -> str:
    """The message for a target that no rank owns."""
    group, rank = group_of(len(lengths))
    hidden, weight, targets = head_case(10, 16, vocab)
    targets[2] = vocab
    try:
        linear_logprob(hidden, shard_of(weight, lengths, rank)[0], targets, group=group, vocab_size=vocab)
    except IndexError as error:
        return str(error)
    return ""
