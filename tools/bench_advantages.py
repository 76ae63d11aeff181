"""group_advantages against a loop over groups and against sorted segments in torch operations."""

from __future__ import annotations

import argparse
from typing import Any

import bench_common as bench
import torch
from bench_common import DEVICE
from dppo_kernels import group_advantages
from torch import Tensor

GROUP = 8


def looped(rewards: Tensor, ids: Tensor) -> Tensor:
    """Group by group, as trainers often have it."""
    found = torch.empty_like(rewards)
    for group in ids.unique():
        here = ids == group
        found[here] = (rewards[here] - rewards[here].mean()) / (rewards[here].std() + 1e-6)
    return found


def composed(rewards: Tensor, ids: Tensor) -> Tensor:
    """Unique ids and indexed sums."""
    groups, place, counts = ids.unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(groups), dtype=torch.float64, device=rewards.device)
    centred = rewards.double() - (zeros.index_add(0, place, rewards.double()) / counts)[place]
    deviation = (zeros.index_add(0, place, centred.square()) / (counts - 1)).sqrt()
    return (centred / (deviation[place] + 1e-6)).float()


def run(count: int, rounds: int) -> list[dict[str, Any]]:
    """One row per contender."""
    torch.manual_seed(0)
    order = torch.randperm(count, device=DEVICE)
    ids = (torch.arange(count, device=DEVICE) // GROUP * 1_000_003)[order]
    rewards = torch.randn(count, device=DEVICE)
    steps = {
        "ours": lambda: group_advantages(rewards, ids),
        "torch": lambda: composed(rewards, ids),
        "torch, looped": lambda: looped(rewards, ids),
    }
    times = bench.time_all(steps, rounds, warmup=2)
    return [
        {
            "contender": f"{name} [{count}]",
            "us": bench.median(values) * 1e3,
            "p10..p90 ms": bench.spread(values),
            "launches": bench.launches(steps[name]),
            "ours / it": bench.ratio(times["ours"], values),
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewards", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--rounds", type=int, default=30 if DEVICE == "cuda" else 5)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    rows = [row for count in options.rewards for row in run(count, options.rounds)]
    bench.show(f"group_advantages, groups of {GROUP} in any order", rows)
    bench.save(options.json, dict(rows=rows))


if __name__ == "__main__":
    main()
