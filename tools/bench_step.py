"""Where the time of a training step goes, with shared prompts on and off.

    python tools/bench_step.py [--preset tiny] [--groups 4] [--group 8] [--prompt 512] [--response 32] [--json FILE]

Half of the prompt's tokens are a clip. `prompt` is the language model's time for the same groups with answers cut to
one token, `response` the rest of it; `head+loss`, `vision`, `optimizer` and `sync` (gradient reduction) are timed where
they are called. FLOPs are counted from what really runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "kernels", ROOT / "tools"):
    sys.path.insert(0, str(folder))

import bench_common as bench  # noqa: E402
import make_tiny  # noqa: E402
import torch  # noqa: E402
from flops import count_flops  # noqa: E402

from dppo_mcore.config import Config, DataConfig, ModelConfig, OptimizerConfig, RlConfig, RunConfig  # noqa: E402
from dppo_mcore.learn import rl  # noqa: E402
from dppo_mcore.learn.loss import PolicyLoss  # noqa: E402
from dppo_mcore.learn.state import Learner, build  # noqa: E402
from dppo_mcore.learn.step import train_step  # noqa: E402
from dppo_mcore.model.config import QwenConfig  # noqa: E402
from dppo_mcore.runtime import device, parallel  # noqa: E402
from dppo_mcore.types import FramePlan, PackedBatch, Prompt, PromptMedia, Rollout, Sample, ScoredRollout  # noqa: E402

PARTS = ("data", "vision", "prompt", "response", "head+loss", "optimizer", "sync")


def make_groups(qwen: QwenConfig, options: argparse.Namespace) -> list[rl.Group]:
    """Groups whose prompt is half clip, half text, with answers of equal length."""
    random = torch.Generator().manual_seed(0)
    unit = qwen.vision.merge_unit
    frames = max(1, options.prompt // 2 // 16)
    grid = (frames, 4 * qwen.vision.spatial_merge_size, 4 * qwen.vision.spatial_merge_size)
    media_tokens = frames * grid[1] * grid[2] // unit
    groups = []
    for number in range(options.groups):
        text = torch.randint(20, 500, (options.prompt - media_tokens - 2,), generator=random).tolist()
        ids = [qwen.vision_start_token_id, *[qwen.video_token_id] * media_tokens, qwen.vision_end_token_id, *text]
        size = (grid[1] * qwen.vision.patch_size, grid[2] * qwen.vision.patch_size)
        plan = FramePlan(f"{number}.mp4", "video", tuple(range(2 * frames)), tuple(map(float, range(2 * frames))), size, grid, 0.5)  # fmt: skip  # noqa: E501
        patches = torch.randn(frames * grid[1] * grid[2], qwen.vision.patch_values, generator=random)
        prompt = Prompt(Sample(f"g{number}", "exact", ()), tuple(ids), (PromptMedia(plan, patches),))
        answers = []
        for index in range(options.group):
            tokens = tuple(torch.randint(20, 500, (options.response,), generator=random).tolist())
            rollout = Rollout(f"g{number}", index, tokens, (-6.0,) * options.response, "", "stop")
            answers.append(ScoredRollout(rollout, float(index % 2), {}, bool(index % 2)))
        groups.append(rl.Group(prompt, tuple(answers)))
    return groups


def cut_answers(groups: list[rl.Group]) -> list[rl.Group]:
    """The same groups with answers of one token."""

    def first(answer: ScoredRollout) -> ScoredRollout:
        rollout = answer.rollout
        return replace(answer, rollout=replace(rollout, token_ids=rollout.token_ids[:1], logprobs=rollout.logprobs[:1]))

    return [rl.Group(group.prompt, tuple(map(first, group.answers))) for group in groups]


class Stopwatch:
    """Adds up the seconds of calls it is put around."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed under `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block under `name`."""
        device.synchronize()
        began = time.perf_counter()
        yield
        device.synchronize()
        self.seconds[name] += time.perf_counter() - began


class TimedLoss:
    """A policy loss whose calls are timed; its gradients are made in them."""

    def __init__(self, inner: PolicyLoss, watch: Stopwatch) -> None:
        self.inner, self.watch = inner, watch

    def count(self, batch: PackedBatch) -> float:
        return self.inner.count(batch)

    def extra_count(self) -> float:
        return self.inner.extra_count()

    def __call__(self, *args: Any) -> Any:
        with self.watch.part("head+loss"):
            return self.inner(*args)


def one_step(learner: Learner, groups: list[rl.Group], watch: Stopwatch) -> None:
    """Pack and train; what the stopwatch isn't put around is the language model's."""
    with watch.part("data"):
        advantages = [[1.0 if answer.success else -1.0 for answer in group.answers] for group in groups]
        batches = rl.pack(learner, groups, advantages)
        batches = [replace(b, columns={**b.columns, "old_logprobs": b.columns["rollout_logprobs"]}) for b in batches]
    with watch.part("step"):
        train_step(learner, batches, TimedLoss(PolicyLoss(), watch))


def split(learner: Learner, groups: list[rl.Group], rounds: int) -> dict[str, float]:
    """Median milliseconds of every part."""
    found: dict[str, list[float]] = defaultdict(list)
    model = learner.models[0]
    plain = model.encode_media, learner.optimizer.step, model.config.finalize_model_grads_func
    for _ in range(rounds):
        language = []
        for some in (groups, cut_answers(groups)):
            watch = Stopwatch()
            model.encode_media = watch.around("vision", plain[0])
            learner.optimizer.step = watch.around("optimizer", plain[1])
            model.config.finalize_model_grads_func = watch.around("sync", plain[2])
            one_step(learner, some, watch)
            inside = ("vision", "head+loss", "optimizer", "sync")
            language.append(watch.seconds["step"] - sum(watch.seconds[name] for name in inside))
            if some is groups:
                whole = watch.seconds
        whole["prompt"], whole["response"] = min(language), max(0.0, language[0] - language[1])
        for name in ("data", *inside, "prompt", "response"):
            found[name].append(1e3 * whole[name])
        found["total"].append(1e3 * (whole["data"] + whole["step"]))
    model.encode_media, learner.optimizer.step, model.config.finalize_model_grads_func = plain
    return {name: bench.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(make_tiny.PRESETS), default="tiny")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=32)
    parser.add_argument("--optimizer", choices=("adam", "muon"), default="adam")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    model = str(make_tiny.make(Path(tempfile.mkdtemp()) / options.preset, preset=options.preset))
    results: dict[str, dict[str, float]] = {}
    flops: dict[str, float] = {}
    for name, share in (("shared", True), ("repeated", False)):
        config = Config(
            run=RunConfig(model=model),
            model=ModelConfig(dtype="bf16" if device.has_cuda() else "fp32"),
            optimizer=OptimizerConfig(optimizer=options.optimizer),
            rl=RlConfig(kl_coef=0.0),
            data=DataConfig(share_prompts=share, max_tokens_per_micro_batch=4 * (options.prompt + options.response)),
        )
        parallel.start(config.parallel, seed=0)
        learner = build(config)
        learner.begin_phase("bench", 1e-6, 1000)
        groups = make_groups(learner.qwen, options)
        one_step(learner, groups, Stopwatch())
        flops[name] = float(count_flops(lambda: one_step(learner, groups, Stopwatch())))  # noqa: B023
        results[name] = split(learner, groups, options.rounds)
    rows: list[dict[str, Any]] = [
        {"ms": part, **{name: found.get(part, 0.0) for name, found in results.items()}} for part in (*PARTS, "total")
    ]
    rows.append({"ms": "GFLOP", **{name: value / 1e9 for name, value in flops.items()}})
    for row in rows:
        row["repeated/shared"] = row["repeated"] / row["shared"] if row["shared"] else float("nan")
    bench.show(
        f"{options.groups} groups of {options.group}, prompt {options.prompt}, response {options.response}, "
        f"{options.preset}, {bench.environment()['device']}",
        rows,
    )
    if options.json:
        bench.save(options.json, {"environment": bench.environment(), "ms": results, "flops": flops})


if __name__ == "__main__":
    main()
