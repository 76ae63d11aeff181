"""A whole GRPO step against TRL's GRPOTrainer on the same checkpoint: time and peak memory.

    python tools/bench_vs_trl.py [--prompts 8] [--group 8] [--prompt-tokens 512] [--answer-tokens 32] [--json FILE]

A step generates the answers (embedded engine here, transformers' generate there), scores them, and makes one
optimizer step. Each side runs in child processes of its own, one thread each, ours and theirs in turn. Peak memory is
the process's resident high-water mark above what it holds with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "kernels", ROOT / "tools"):
    sys.path.insert(0, str(folder))


@dataclass(frozen=True)
class Shape:
    """The work of a step."""

    prompts: int
    group: int
    prompt_tokens: int
    answer_tokens: int
    steps: int
    warmup: int


def texts(tokenizer: Any, shape: Shape, count: int) -> list[str]:
    """Prompts of exactly `prompt_tokens` tokens."""
    chance, found = random.Random(0), []
    while len(found) < count:
        text = ""
        while (length := len(tokenizer(text)["input_ids"])) < shape.prompt_tokens:
            words = max(1, (shape.prompt_tokens - length) // 4)
            text += "".join(f" {chance.randrange(1000)}" for _ in range(words))
        if length == shape.prompt_tokens:
            found.append(text)
    return found


def reward(token_ids: list[int]) -> float:
    """Share of even ids: cheap, and different from answer to answer."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


class Peak:
    """Resident memory above a mark."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._base = self._read("VmRSS")

    def mib(self) -> float:
        """Most held since, beyond what was held then."""
        return (self._read("VmHWM") - self._base) / 1024

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


def run_ours(model: str, shape: Shape) -> dict[str, Any]:
    """Embedded engine, shared prompts, one packed update."""
    from transformers import AutoTokenizer

    from dppo_mcore.config import Config, DataConfig, ModelConfig, RlConfig, RolloutConfig, RunConfig
    from dppo_mcore.learn.rl import Group, rl_step
    from dppo_mcore.learn.state import wrap
    from dppo_mcore.model.config import load_qwen_config
    from dppo_mcore.model.model import build_model
    from dppo_mcore.model.weights import load_hf_weights
    from dppo_mcore.rollout.base import GenerationRequest, Sampling, banned_ids, make_engine
    from dppo_mcore.runtime import parallel
    from dppo_mcore.types import Prompt, Sample, ScoredRollout

    config = Config(
        run=RunConfig(model=model),
        model=ModelConfig(dtype="fp32"),
        data=DataConfig(max_tokens_per_micro_batch=2 * (shape.prompt_tokens + shape.group * shape.answer_tokens)),
        rollout=RolloutConfig(max_response_tokens=shape.answer_tokens),
        rl=RlConfig(group_size=shape.group, kl_coef=0.0),
    )
    parallel.start(config.parallel, seed=0)
    tokenizer, qwen = AutoTokenizer.from_pretrained(model), load_qwen_config(model)
    prompts = texts(tokenizer, shape, shape.prompts)
    models = build_model(qwen, config)
    load_hf_weights(models, model, qwen)
    peak = Peak()
    learner = wrap(config, qwen, models)
    learner.begin_phase("rl", 1e-6, 100)
    engine = make_engine(config, qwen, learner.models, tokenizer)
    engine.start()
    sampling = Sampling(max_tokens=shape.answer_tokens, banned_token_ids=banned_ids(qwen))
    samples = [
        Prompt(Sample(f"p{n}", "exact", ()), tuple(tokenizer(text)["input_ids"])) for n, text in enumerate(prompts)
    ]
    parts: dict[str, list[float]] = {"generate": [], "train": []}

    def step(number: int) -> None:
        began = time.perf_counter()
        engine.update_weights(number)
        requests = [GenerationRequest(p.sample.id, p, shape.group, seed=number) for p in samples]
        answers: dict[str, list[ScoredRollout]] = {p.sample.id: [] for p in samples}
        for rollout in engine.generate(requests, sampling):
            assert len(rollout.token_ids) == shape.answer_tokens
            answers[rollout.sample_id].append(ScoredRollout(rollout, reward(list(rollout.token_ids)), {}, False))
        generated = time.perf_counter()
        rl_step(learner, [Group(p, tuple(answers[p.sample.id])) for p in samples])
        parts["generate"].append(generated - began)
        parts["train"].append(time.perf_counter() - generated)

    seconds = timed(step, shape)
    return {"seconds": seconds, "peak_mib": peak.mib()} | {k: v[shape.warmup :] for k, v in parts.items()}


def run_trl(model: str, shape: Shape) -> dict[str, Any]:
    """TRL's trainer as installed, its defaults for everything the task leaves open; fp32, no reference model."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    steps = shape.warmup + shape.steps
    dataset = Dataset.from_dict({"prompt": texts(tokenizer, shape, shape.prompts * steps)})
    policy = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    peak = Peak()
    options = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=shape.prompts * shape.group,
        num_generations=shape.group,
        max_completion_length=shape.answer_tokens,
        generation_kwargs={"min_new_tokens": shape.answer_tokens},
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        epsilon_high=0.28,
        max_steps=steps,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    trainer = GRPOTrainer(
        model=policy,
        args=options,
        processing_class=tokenizer,
        train_dataset=dataset,
        reward_funcs=lambda completion_ids, **_: [reward(list(ids)) for ids in completion_ids],
        callbacks=[Clock()],
    )
    trainer.train()
    return {"seconds": seconds[shape.warmup :], "peak_mib": peak.mib()}


def timed(step: Callable[[int], None], shape: Shape) -> list[float]:
    """Seconds of the steps after the warm-up."""
    seconds = []
    for number in range(shape.warmup + shape.steps):
        began = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
    return seconds[shape.warmup :]


def child(side: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        shape = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in Shape.__dataclass_fields__]
        command = [sys.executable, "-W", "ignore", __file__, "--child", side, "--model", model, "--json", answer.name]
        done = subprocess.run([*command, *shape], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
        return json.loads(Path(answer.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a child")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="children of each side, in turn")
    parser.add_argument("--model", default="", help="checkpoint; empty makes the tiny one")
    parser.add_argument("--json", default="", help="write the figures here too")
    parser.add_argument("--child", choices=("ours", "trl"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        import torch

        torch.set_num_threads(1)
        shape = Shape(**{name: getattr(options, name) for name in Shape.__dataclass_fields__})
        result = (run_ours if options.child == "ours" else run_trl)(options.model, shape)
        Path(options.json).write_text(json.dumps(result))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Both sides in turn; one table, the ratio last."""
    import bench_common as bench
    import make_tiny

    model = options.model or str(make_tiny.make(Path(tempfile.mkdtemp()) / "tiny"))
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(options.rounds):
        for side, results in found.items():
            results.append(child(side, model, options))
    seconds = {side: [bench.median(r["seconds"]) for r in results] for side, results in found.items()}
    peaks = {side: [r["peak_mib"] for r in results] for side, results in found.items()}
    rows: list[dict[str, Any]] = [
        {"side": side, "s/step": bench.median(seconds[side]), "peak MiB above model": bench.median(peaks[side])}
        for side in found
    ]
    ratios = {"time": bench.ratio(seconds["ours"], seconds["trl"]), "peak": bench.ratio(peaks["ours"], peaks["trl"])}
    rows.append({"side": "ours/trl", "s/step": ratios["time"], "peak MiB above model": ratios["peak"]})
    bench.show(f"GRPO step, {options.prompts} x {options.group} answers, {bench.environment()}", rows)
    parts = {name: bench.median([v for r in found["ours"] for v in r[name]]) for name in ("generate", "train")}
    print("  ours: " + ", ".join(f"{name} {value:.2f} s" for name, value in parts.items()))
    if options.json:
        bench.save(options.json, {"environment": bench.environment(), "runs": found, "ratios": ratios})


if __name__ == "__main__":
    main()
