"""A GRPO group as one shared prompt against the same group as separate sequences: FLOPs, time, gradients.

    python tools/bench_shared_prompt.py [--prompt 2048] [--group 8] [--response 64] [--preset tiny] [--json FILE]

Both packings run forward and backward through the whole language model and the head, in turn, in this process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "kernels", ROOT / "tools"):
    sys.path.insert(0, str(folder))

import make_tiny  # noqa: E402
import torch  # noqa: E402
from dppo_kernels import linear_logprob  # noqa: E402
from flops import count_flops  # noqa: E402

from dppo_mcore.config import Config, ModelConfig, ParallelConfig  # noqa: E402
from dppo_mcore.runtime import device, parallel  # noqa: E402
from dppo_mcore.types import PackedBatch, SequenceRef  # noqa: E402


def pack(prompt_P: torch.Tensor, answers_GN: torch.Tensor, shared: bool) -> PackedBatch:
    """One row holding the group, its prompt once or once per answer; the loss rows come in the same order."""
    group, answer = answers_GN.shape
    prompt = len(prompt_P)
    every = torch.arange(group)
    if shared:
        ids = torch.cat([prompt_P, answers_GN.flatten()])
        positions = torch.cat([torch.arange(prompt), (prompt + torch.arange(answer)).repeat(group)])
        segments = torch.zeros(len(ids))
        branches = torch.cat([torch.zeros(prompt), (every + 1).repeat_interleave(answer)])
        starts = prompt + every * answer
        firsts = torch.full((group,), prompt - 1)
    else:
        ids = torch.cat([prompt_P.expand(group, -1), answers_GN], dim=1).flatten()
        positions = torch.arange(prompt + answer).repeat(group)
        segments = every.repeat_interleave(prompt + answer)
        branches = torch.zeros(len(ids))
        starts = every * (prompt + answer) + prompt
        firsts = starts - 1
    rows = torch.cat([firsts[:, None], starts[:, None] + torch.arange(answer - 1)], dim=1).flatten()
    return PackedBatch(
        token_ids_L=ids,
        position_ids_3L=positions.expand(3, -1).contiguous(),
        segments_L=segments.to(torch.int32),
        branches_L=branches.to(torch.int32),
        loss_rows_R=rows,
        targets_R=answers_GN.flatten(),
        cu_rows=torch.arange(0, group * answer + 1, answer, dtype=torch.int32),
        sequences=tuple(SequenceRef("bench", index) for index in range(group)),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=2048, help="prompt tokens")
    parser.add_argument("--group", type=int, default=8, help="answers per prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens per answer")
    parser.add_argument("--preset", choices=sorted(make_tiny.PRESETS), default="tiny", help="model size")
    parser.add_argument("--attention-backend", default="auto", choices=("auto", "flex", "sdpa"))
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each packing; the fastest counts")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = measure(arguments)
    print(f"{'packing':<10}{'tokens':>9}{'GFLOP':>11}{'seconds':>10}")
    for name in ("separate", "shared"):
        row = figures[name]
        print(f"{name:<10}{row['tokens']:>9}{row['flops'] / 1e9:>11.2f}{row['seconds']:>10.3f}")
    print(f"worst relative gradient difference {figures['gradient_difference']:.2e}")
    print(f"FLOPs ratio {figures['flops_ratio']:.3f}   speed-up {figures['speedup']:.2f}x")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of both packings and their ratios."""
    parallel.start(ParallelConfig(), seed=0)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from dppo_mcore.model.config import load_qwen_config
    from dppo_mcore.model.model import build_model
    from dppo_mcore.model.weights import load_hf_weights

    with tempfile.TemporaryDirectory() as folder:
        make_tiny.make(folder, preset=arguments.preset)
        qwen = load_qwen_config(folder)
        settings = ModelConfig(dtype="fp32", freeze_merger=True, attention_backend=arguments.attention_backend)
        chunks = build_model(qwen, Config(model=settings))
        load_hf_weights(chunks, folder, qwen)
    model = chunks[0]
    # As in training: kernels that add a weight's gradient where it belongs need the place for it.
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 256, (arguments.prompt,), generator=generator)
    answers = torch.randint(0, 256, (arguments.group, arguments.response), generator=generator)
    weights = torch.randn(answers.numel(), generator=generator).to(device.device())
    batches = {"separate": pack(prompt, answers, False), "shared": pack(prompt, answers, True)}

    def step(batch: PackedBatch) -> None:
        wrapped.zero_grad_buffer()
        targets = batch.targets_R.to(device.device())
        logprobs, _ = linear_logprob(wrapped(batch), model.head_weight(), targets, vocab_size=qwen.vocab_size)
        (logprobs * weights).sum().backward()

    figures: dict[str, Any] = {}
    gradients = {}
    for name, batch in batches.items():
        flops = count_flops(lambda batch=batch: step(batch))
        gradients[name] = {key: p.main_grad.clone() for key, p in model.named_parameters() if p.requires_grad}
        figures[name] = {"tokens": len(batch.token_ids_L), "flops": flops, "seconds": float("inf")}
    for _ in range(arguments.repeats):
        for name, batch in batches.items():
            device.synchronize()
            began = time.perf_counter()
            step(batch)
            device.synchronize()
            figures[name]["seconds"] = min(figures[name]["seconds"], time.perf_counter() - began)
    parallel.stop()
    separate, shared = figures["separate"], figures["shared"]
    figures["flops_ratio"] = shared["flops"] / separate["flops"]
    figures["speedup"] = separate["seconds"] / shared["seconds"]
    figures["gradient_difference"] = max(
        float((gradients["shared"][key] - full).abs().max() / full.abs().max())
        for key, full in gradients["separate"].items()
    )
    return figures


if __name__ == "__main__":
    main()
