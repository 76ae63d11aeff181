"""A 12-step run of both phases that saves as it goes and resumes from what it finds; killed at will by its test."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from dppo_mcore.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, RlConfig, RunConfig
from dppo_mcore.learn import checkpoint, rl, sft, state
from dppo_mcore.runtime import parallel
from tests.learn.groups import random_conversations, random_groups

STEPS = 12


def main(model: str, run: str, optimizer: str) -> None:
    """Run to the end; leaves RUN/final.json with a digest of weights, counters and learning rates."""
    torch.set_num_threads(1)
    parallel.start(ParallelConfig(), seed=0)
    options = OptimizerConfig(optimizer=optimizer, lr_schedule="linear")
    learner = state.build(
        Config(
            run=RunConfig(model=model), model=ModelConfig(dtype="fp32"), optimizer=options, rl=RlConfig(kl_coef=0.05)
        )
    )
    folder = Path(run)
    saver = checkpoint.Saver(folder / "checkpoints", keep=2, background=True)
    begun, rates = 0, []
    if checkpoint.latest(saver.folder) is not None:
        extra = checkpoint.load(learner, saver.folder)
        begun, rates = extra["steps"], extra["rates"]
    for step in range(begun, STEPS):
        if step == 0:
            learner.keep_reference()
            learner.begin_phase("rl", 1e-3, STEPS // 2)
        if step == STEPS // 2:
            learner.begin_phase("sft", 1e-3, STEPS // 2)
        if step < STEPS // 2:
            result = rl.rl_step(learner, random_groups(learner.qwen, 3, 3, seed=step)).updates[0]
        else:
            result = sft.sft_step(learner, random_conversations(learner.qwen, 4, seed=step)).update
        rates.append(result.lr)
        saver.poll()
        if step % 2:
            saver.save(learner, step + 1, {"steps": step + 1, "rates": rates})
        with open(folder / "steps", "a") as file:
            file.write(f"{step}\n")
    saver.finish()
    digest = hashlib.sha256()
    for name, parameter in learner.models[0].named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    final = {"weights": digest.hexdigest(), "learner": learner.state_dict(), "rates": rates}
    (folder / "final.json").write_text(json.dumps(final))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
