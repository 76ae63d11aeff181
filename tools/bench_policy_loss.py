"""policy_loss, forward and backward, against the same loss in torch operations; launches and bandwidth."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import bench_common as bench
import torch
from bench_common import DEVICE
from dppo_kernels import policy_loss
from torch import Tensor

BYTES_PER_TOKEN = 25
"""Log-prob, old, reference, rollout, advantage, mask read; gradient written."""
COUNTS = (8192, 32768, 131072, 1 << 20, 8 << 20)


def eager(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ref: Tensor, rollout: Tensor) -> Tensor:
    """Clipped loss with truncated weights and k3 penalty, token-mean."""
    ratio = (new - old).clamp(-20, 20).exp()
    weight = (old - rollout).exp().clamp(max=2.0)
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    delta = ref - new
    loss = clipped * weight + 0.01 * (delta.exp() - 1 - delta)
    return torch.where(mask, loss, 0.0).sum() / mask.sum()


def ours(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ref: Tensor, rollout: Tensor) -> Tensor:
    """The same by the kernel."""
    return policy_loss(
        new, old, advantages, mask, ref_logprobs=ref, rollout_logprobs=rollout, tis_cap=2.0, kl_coef=0.01
    )[0]


def run(count: int, rounds: int) -> list[dict[str, Any]]:
    """One row per contender."""
    torch.manual_seed(0)
    old = -torch.rand(count, device=DEVICE) * 3
    noise = [0.1 * torch.randn(count, device=DEVICE) for _ in range(3)]
    rest = (
        old,
        torch.randn(count, device=DEVICE),
        torch.rand(count, device=DEVICE) < 0.8,
        old + noise[1],
        old + noise[2],
    )
    new = (old + noise[0]).requires_grad_()
    upstream = torch.ones((), device=DEVICE)

    def step(loss: Callable[..., Tensor]) -> Callable[[], None]:
        def work() -> None:
            new.grad = None
            loss(new, *rest).backward(upstream)

        return work

    steps = {"ours": step(ours), "torch eager": step(eager)}
    if DEVICE == "cuda":
        steps["torch.compile"] = step(torch.compile(eager))
        steps |= {f"{name}, graph": replayed(work) for name, work in list(steps.items())[:2]}
    times = bench.time_all(steps, rounds, warmup=3)
    rows = []
    for name, values in times.items():
        rows.append(
            {
                "contender": f"{name} [{count}]",
                "us": bench.median(values) * 1e3,
                "p10..p90 ms": bench.spread(values),
                "GB/s": BYTES_PER_TOKEN * count / bench.median(values) / 1e6,
                "launches": None if "graph" in name else bench.launches(steps[name]),
                "ours / it": bench.ratio(times["ours"], values),
            }
        )
    return rows


def replayed(work: Callable[[], None]) -> Callable[[], None]:
    """The same work as a captured graph: device time without the host's."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=COUNTS if DEVICE == "cuda" else COUNTS[:3])
    parser.add_argument("--rounds", type=int, default=50 if DEVICE == "cuda" else 5)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    bandwidth = bench.copy_gigabytes_per_second()
    rows = [row for count in options.tokens for row in run(count, options.rounds)]
    bench.show(f"policy_loss, forward and backward (a large copy: {bandwidth:.0f} GB/s)", rows)
    bench.save(options.json, dict(copy_gigabytes_per_second=bandwidth, rows=rows))


if __name__ == "__main__":
    main()
