"""The vocabulary head: linear_policy_loss and linear_logprob against other implementations and the cuBLAS ceiling.

On CUDA the default shapes are one tensor-parallel shard of a 7B's and a 72B's head, on CPU a small one. Contenders
that are not installed are named and skipped. `--verl FILE` gives verl's linear_cross_entropy.py. "ours" is the call as
the trainer makes it, the weight's gradient into `main_grad`; "ours, autograd" hands it to autograd.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_common as bench
import torch
from bench_common import DEVICE
from dppo_kernels import linear_logprob, linear_policy_loss, products
from torch import Tensor

CUDA_SHAPES = ("8192,3584,19008", "8192,8192,19008", "4096,3584,152064")
CPU_SHAPES = ("1024,512,16384",)
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Task:
    """One shape's data. hidden [N, H] and weight [V, H] require gradients; `mask` [N] marks the response rows."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    held: Tensor
    """The same weight with a `main_grad`."""
    rows: int
    workspace_mib: float


def make_task(rows: int, width: int, vocab: int, valid: float, workspace_mib: float) -> Task:
    """Random data with logits of deviation 2.5; targets are likely tokens (the best of 64)."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab, width, device=DEVICE) * (2.5 / width**0.5)).to(dtype)
    candidates = torch.randint(0, vocab, (rows, 64), device=DEVICE)
    scores = torch.empty(rows, 64, device=DEVICE)
    for first in range(0, rows, 256):
        part = slice(first, first + 256)
        scores[part] = torch.einsum("nh,nch->nc", hidden[part].float(), weight[candidates[part]].float())
    targets = candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    mask = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    mask[-max(1, round(rows * valid)) :] = True
    with torch.no_grad():
        old = linear_logprob(hidden, weight, targets)[0] + 0.1 * torch.randn(rows, device=DEVICE)
    advantages = torch.randn(rows, device=DEVICE)
    hidden.requires_grad_()
    held = weight.detach().requires_grad_()
    held.main_grad = torch.zeros(weight.shape, device=DEVICE)
    held.grad_added_to_main_grad = False
    weight.requires_grad_()
    return Task(hidden, weight, targets, old, advantages, mask, held, int(mask.sum()), workspace_mib)


def eager_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, wide: bool = True) -> Tensor:
    """Whole logits, log-softmax, gather."""
    logits = hidden @ weight.t()
    logits = logits.float() if wide else logits
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].float()


def eager_policy(logprobs: Tensor, task: Task) -> Tensor:
    """Clipped objective over the response rows, as torch operations."""
    ratio = (logprobs - task.old).exp()
    loss = -torch.minimum(ratio * task.advantages, ratio.clamp(0.8, 1.28) * task.advantages)
    return torch.where(task.mask, loss, 0.0).sum() / task.mask.sum()


def learn(task: Task, step: Step) -> None:
    """Forward and backward, gradients thrown away."""
    forget(task)
    step().backward()


def forget(task: Task) -> None:
    """Drop the gradients of an earlier call."""
    task.hidden.grad = task.weight.grad = task.held.grad = None


def policy_steps(task: Task, others: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Forward and backward of the policy loss."""
    plain = (task.hidden, task.weight, task.targets)

    def ours(weight: Tensor, **more: Any) -> Tensor:
        columns = (task.old, task.advantages, task.mask)
        return linear_policy_loss(
            task.hidden, weight, task.targets, *columns, workspace_mib=task.workspace_mib, valid_count=task.rows, **more
        )[0]

    def trained() -> Tensor:
        return ours(task.held, upstream=1.0)

    def composed(logprob: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: eager_policy(logprob(*plain), task)

    steps: dict[str, Step] = {
        "ours": trained,
        "ours again": trained,
        "ours, autograd": functools.partial(ours, task.weight),
        "ours, two ops": composed(lambda *a: linear_logprob(*a, workspace_mib=task.workspace_mib)[0]),
        "torch eager": composed(eager_logprob),
    }
    if DEVICE == "cuda":
        steps["torch eager bf16"] = composed(functools.partial(eager_logprob, wide=False))
        compiled = torch.compile(lambda *a: eager_policy(eager_logprob(*a), task))
        steps["torch.compile"] = lambda: compiled(*plain)
    for name, logprob in others.items():
        steps[name] = composed(logprob)
    return {name: functools.partial(learn, task, step) for name, step in steps.items()}


def forward_steps(task: Task, others: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """Log-probs of the response rows alone (all implementations given the compacted rows), no gradient."""
    rows = (task.hidden.detach()[task.mask], task.weight.detach(), task.targets[task.mask])
    steps: dict[str, Callable[..., Tensor]] = {
        "ours": lambda *a: linear_logprob(*a, workspace_mib=task.workspace_mib)[0],
        "torch eager": eager_logprob,
    }
    if DEVICE == "cuda":
        steps["ours, fused"] = lambda *a: linear_logprob(*a, backend="triton_fused")[0]
        steps["torch.compile"] = torch.compile(eager_logprob)
    steps |= others
    return {name: torch.no_grad()(functools.partial(step, *rows)) for name, step in steps.items()}


def other_logprobs(verl: str | None) -> dict[str, Callable[..., Tensor]]:
    """Per-token log-probs of other packages."""
    found: dict[str, Callable[..., Tensor]] = {}
    try:
        from cut_cross_entropy import linear_cross_entropy

        for impl in ("cce_exact", "cce"):
            name = impl if impl == "cce_exact" else "cce (approximate)"
            found[name] = lambda h, w, t, impl=impl: -linear_cross_entropy(h, w, t, impl=impl, reduction="none").float()
    except ImportError as error:
        print(f"skipped cut-cross-entropy: {error}", file=sys.stderr)
    if verl:
        try:
            kernel = _load(Path(verl)).linear_cross_entropy
            found["verl"] = lambda h, w, t: kernel(h, w, t, 1.0, "none")[0]
        except ImportError as error:
            print(f"skipped verl: {error}", file=sys.stderr)
    else:
        print("skipped verl: no --verl FILE given", file=sys.stderr)
    return found


def mean_steps(task: Task) -> dict[str, Callable[[], None]]:
    """Mean cross entropy, for implementations that know no other loss."""
    steps: dict[str, Step] = {}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        steps["liger"] = lambda: liger(task.weight, task.hidden, task.targets)
    except (ImportError, TypeError) as error:
        print(f"skipped liger-kernel: {error}", file=sys.stderr)
        return {}
    ones, zeros = torch.ones_like(task.old), torch.zeros_like(task.old)
    steps["ours"] = lambda: linear_policy_loss(
        task.hidden, task.weight, task.targets, zeros, ones, ones, workspace_mib=task.workspace_mib
    )[0]
    return {name: functools.partial(learn, task, step) for name, step in steps.items()}


def ceilings(task: Task, rounds: int) -> dict[str, float]:
    """Milliseconds of the three products alone at the same shapes; on CUDA also those with fp32 results."""
    hidden = task.hidden.detach()[task.mask]
    weight = task.weight.detach()
    logits = hidden @ weight.t()
    calls = dict(
        logits=lambda: torch.mm(hidden, weight.t()),
        hidden_grad=lambda: torch.mm(logits, weight),
        weight_grad=lambda: torch.mm(logits.t(), hidden),
    )
    if DEVICE == "cuda":
        wide = torch.empty(logits.shape, device=DEVICE)
        calls["logits in fp32"] = lambda: products.logits_into(wide, hidden, weight)
        calls["weight_grad added in fp32"] = lambda: products.weight_grad_into(
            task.held.main_grad, logits, hidden, add=True
        )
    return {name: bench.median(times) for name, times in bench.time_all(calls, rounds).items()}


def accuracy(logprob: Callable[..., Tensor], task: Task) -> tuple[float, float]:
    """Largest and mean error of the log-probs against fp64 on 256 rows."""
    rows = task.mask.nonzero()[:256, 0]
    hidden, targets = task.hidden.detach()[rows], task.targets[rows]
    with torch.no_grad():
        found = logprob(hidden, task.weight.detach(), targets).double()
        top = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=DEVICE)
        for first in range(0, task.weight.shape[0], 8192):
            part = hidden.double() @ task.weight[first : first + 8192].double().t()
            top = torch.logaddexp(top, part.logsumexp(1))
        chosen = torch.einsum("nh,nh->n", hidden.double(), task.weight[targets].double())
        error = (found - (chosen - top)).abs()
    return error.max().item(), error.mean().item()


def run_shape(shape: str, valid: float, options: argparse.Namespace, others: dict[str, Any]) -> dict[str, Any]:
    """All tables of one shape and fraction of response rows."""
    count, width, vocab = (int(part) for part in shape.split(","))
    task = make_task(count, width, vocab, valid, options.workspace_mib)
    flops = 2.0 * task.rows * width * vocab
    before = ceilings(task, options.rounds)
    title = f"N={count} H={width} V={vocab} response rows={valid:.0%}"
    result: dict[str, Any] = dict(shape=shape, valid=valid, rows=task.rows, workspace_mib=task.workspace_mib)
    tables = {}
    outputs = (task.hidden.numel() + task.weight.numel()) * 4 / 2**20
    ran: set[str] = set()
    for name, steps, factor in (
        ("policy loss, forward and backward", policy_steps(task, others), 3),
        ("log-probs, forward only", forward_steps(task, others), 1),
        ("mean cross entropy, forward and backward", mean_steps(task), 3),
    ):
        times = bench.time_all(steps, options.rounds)
        forget(task)
        ran |= set(times)
        floor = sum(before[name] for name in ("logits", "hidden_grad", "weight_grad")[:factor])
        rows = []
        for contender, values in times.items():
            ms = bench.median(values)
            rows.append(
                {
                    "contender": contender,
                    "ms": ms,
                    "p10..p90": bench.spread(values),
                    "useful TFLOP/s": factor * flops / ms / 1e9,
                    "of ceiling": floor / ms,
                    "peak MiB": bench.peak_mib(steps[contender]),
                    "ours / it": bench.ratio(times["ours"], values) if "ours" in times else None,
                }
            )
            forget(task)
        bench.show(f"{title}: {name}", rows)
        tables[name] = rows
    exact = {"ours": lambda *a: linear_logprob(*a)[0], "torch eager": eager_logprob} | others
    exact = {contender: step for contender, step in exact.items() if contender in ran}
    result["logprob_error_max_mean"] = {name: accuracy(step, task) for name, step in exact.items()}
    after = ceilings(task, options.rounds)
    drift = max(abs(after[name] / before[name] - 1) for name in before)
    print(f"  log-prob error (max, mean) against fp64: {result['logprob_error_max_mean']}")
    print(f"  the three products alone: {before} ms; drift over the run {drift:.1%}" + (" DRIFT > 3%" * (drift > 0.03)))
    print(f"  gradients alone {outputs:.1f} MiB (fp32), workspace {task.workspace_mib} MiB")
    return result | dict(ceilings_ms=before, ceilings_after_ms=after, tables=tables, outputs_mib=outputs)


def _load(path: Path) -> Any:
    """A module by its file, with its folder as its package."""
    package = path.parent.name
    spec = importlib.util.spec_from_file_location(package, path.parent / "__init__.py",
                                                  submodule_search_locations=[str(path.parent)])  # fmt: skip
    assert spec is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{path.stem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="N,H,V", help="rows, hidden size, vocabulary of the shard")
    parser.add_argument("--valid", nargs="+", type=float, default=[1.0, 0.3], help="fractions of response rows")
    parser.add_argument("--workspace-mib", type=float, default=None, help="default: 1024 on CUDA, 16 on CPU")
    parser.add_argument("--rounds", type=int, default=30 if DEVICE == "cuda" else 5)
    parser.add_argument("--verl", metavar="FILE", help="verl's linear_cross_entropy.py")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    options.workspace_mib = options.workspace_mib or (1024 if DEVICE == "cuda" else 16)
    others = other_logprobs(options.verl)
    shapes = options.shapes or (CUDA_SHAPES if DEVICE == "cuda" else CPU_SHAPES)
    results = []
    for shape in shapes:
        for valid in options.valid:
            results.append(run_shape(shape, valid, options, others))
            bench.save(options.json, dict(results=results))
    summary = []
    for result in results:
        rows = {row["contender"]: row for row in result["tables"]["policy loss, forward and backward"]}
        forward = {row["contender"]: row for row in result["tables"]["log-probs, forward only"]}
        summary.append(
            {
                "shape": result["shape"],
                "response rows": result["valid"],
                "of ceiling, f+b": rows["ours"]["of ceiling"],
                "of ceiling, forward": forward["ours"]["of ceiling"],
                "peak MiB": max(rows[name]["peak MiB"] for name in ("ours", "ours, autograd")),
                "workspace + outputs": result["workspace_mib"] + result["outputs_mib"],
                "ours / torch eager": rows.get("torch eager", {}).get("ours / it"),
            }
        )
    bench.show("Summary (torch eager: unfused, all rows through the head)", summary)
    bench.save(options.json, dict(results=results, summary=summary))


if __name__ == "__main__":
    main()
