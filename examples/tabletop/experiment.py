"""The paper's contrasts at small scale: arms from one base a seed, over several seeds.

    python examples/tabletop/experiment.py [--preset cpu|gpu] [--arms dppo rl-only ...] [--seeds 1 2 3] [--out DIR]

Every arm is the product's own training with other options; a finished run is not run again, a stopped one goes on, so
the same command completes what is missing. `--summary` only writes tables and plots from what is there.
Budgets: arms with RL see about the same number of rollouts (arms without buffers or mining have more RL steps in their
place), arms with SFT learn the same number of SFT steps. Nothing else is equal: SFT alone sees only the rollouts that
find its weaknesses, a fifth of the others', and every arm gets labels for whatever it is weak at. What each really used
stands in the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.tabletop.make_world import WorldOptions  # noqa: E402  after the path

CONFIG = "examples/tiny.yaml"
ALWAYS = {"base-sft-window": 0, "stagnation-threshold": 1.0, "last-sft": True, "sft-epochs": 10,
          "save-interval": 60, "log-interval": 10,
          "note": "The base is inconsistent on purpose: half of its answers are in a style the verifier rejects, a "
                  "fifth of its labels are wrong, and planning is withheld."}  # fmt: skip
"""Lengths are fixed in every arm: a phase that may end itself would make budgets unequal, and so would a small corpus
if it were passed through only a few times (`sft-max-steps` ends the passes)."""


@dataclass(frozen=True)
class Preset:
    """Lengths and sizes of every run."""

    base_steps: int
    rl_steps: int
    """RL steps per loop of an arm with two loops."""
    rl_only_steps: int
    """The same of an arm without SFT: the steps beyond stand for a loop's buffer and mining."""
    random_steps: int
    """The same of an arm without a buffer: the steps beyond stand for it."""
    options: dict[str, object]
    jobs: int
    cache: Path
    world: WorldOptions
    size: str = "small"

    def common(self) -> dict[str, object]:
        """Options of all arms."""
        lengths = {"rl-min-steps": self.rl_steps, "rl-max-steps": self.rl_steps}
        return ALWAYS | lengths | self.options | self.paths()

    def paths(self) -> dict[str, object]:
        """Model and manifests."""
        world = self.cache / "world"
        files = {"data": "pool", "general-data": "general", "base-data": "base", "eval-data": "eval",
                 "eval-general-data": "eval_general", "teacher-file": "teacher"}  # fmt: skip
        return {"model": self.cache / "base"} | {flag: world / f"{name}.jsonl" for flag, name in files.items()}


PRESETS = {
    "cpu": Preset(900, 40, 60, 52, {"buffer-samples": 1200, "eval-samples": 360, "sft-max-steps": 150}, 2,
                  ROOT / ".cache" / "tabletop-experiment", WorldOptions()),
    # Clips of 25 frames a second, some 27 million parameters, and decoding by the GPU: for one H100 or H200.
    "gpu": Preset(3000, 120, 132, 128,
                  {"dtype": "bf16", "decoder": "auto", "data-workers": 8, "prompts-per-step": 128,
                   "group-size": 16, "buffer-samples": 4000, "eval-samples": 720, "sft-max-steps": 400,
                   "base-sft-lr": 1e-3, "sft-lr": 6e-4, "rl-lr": 2e-4, "rollout-max-in-flight": 4096,
                   "max-tokens-per-micro-batch": 32768},
                  1, ROOT / ".cache" / "tabletop-large", WorldOptions(fps=25), "large"),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A contrast: what it is called in tables, and its options beside the common ones."""

    title: str
    options: dict[str, object]


ARMS = {
    "dppo": Arm("DPPO (RL and SFT in turn, by difficulty, anchors)", {"anchor-share": 0.15}),
    "rl-only": Arm("RL only, random sampling",
                   {"mode": "rl-only", "sampling": "random"}),
    "sft-only": Arm("SFT only, as many SFT steps", {"mode": "sft-only"}),
    "dppo-random": Arm("DPPO with random sampling", {"sampling": "random"}),
    "dppo-no-anchors": Arm("DPPO, mastered samples dropped", {"anchor-share": 0.0}),
    "dppo-kl": Arm("DPPO, mastered samples dropped, KL 0.02", {"anchor-share": 0.0, "kl-coef": 0.02}),
    "dppo-narrow": Arm("DPPO without own and general answers in SFT",
                       {"anchor-share": 0.15, "mix-weak": 0.7, "mix-retrieved": 0.3, "mix-own": 0.0,
                        "mix-general": 0.0}),
}  # fmt: skip


def command(run: Path, seed: int, options: dict[str, object]) -> list[str]:
    """Command line of one training run on one process."""
    made = [sys.executable, "-m", "dppo_mcore.train", "--config", CONFIG, "--run-folder", str(run), "--seed", str(seed)]
    for name, value in options.items():
        if isinstance(value, bool):
            made.append(f"--{name}" if value else f"--no-{name}")
        else:
            made += [f"--{name}", str(value)]
    return made


def finished(run: Path) -> bool:
    """Whether the run's log says so."""
    log = run / "experiment.log"
    return log.exists() and "\nfinished;" in "\n" + log.read_text()


def execute(run: Path, seed: int, options: dict[str, object]) -> float:
    """Train (or go on training) a run; returns the seconds it took now."""
    if finished(run):
        return 0.0
    run.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_OFFLINE": "1", **os.environ}  # fmt: skip
    with (run / "experiment.log").open("a") as log:
        done = subprocess.run(
            command(run, seed, options), cwd=ROOT, env=environment, stdout=log, stderr=log, check=False
        )
    if done.returncode or not finished(run):
        raise SystemExit(f"{run} did not finish; see {run}/experiment.log, then run the same command again")
    return time.monotonic() - began


def make_base(preset: Preset, out: Path, seed: int) -> Path:
    """The base all arms of a seed start from: the checkpoint after the first SFT, before the run's one RL step."""
    run = out / f"base-{seed}"
    execute(run, seed, base_options(preset))
    return run / "checkpoints" / f"step-{preset.base_steps:08d}"


def base_options(preset: Preset) -> dict[str, object]:
    """The whole first SFT and one RL step, as a run needs RL."""
    return preset.common() | {"mode": "rl-only", "loops": 1, "sampling": "random", "base-sft-steps": preset.base_steps,
                              "rl-min-steps": 1, "rl-max-steps": 1, "keep-checkpoints": 4}  # fmt: skip


def arm_options(preset: Preset, arm: str, base: Path) -> dict[str, object]:
    """All options of an arm."""
    made = preset.common() | {"load": base, "base-sft-steps": 0} | ARMS[arm].options
    if made.get("sampling") == "random":
        steps = preset.rl_only_steps if made.get("mode") == "rl-only" else preset.random_steps
        made |= {"rl-min-steps": steps, "rl-max-steps": steps}
    return made


def main() -> int:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="two CPU cores, or one GPU")
    parser.add_argument("--jobs", type=int, help="runs at a time, a process each; default: the preset's")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/experiment (-gpu)")
    parser.add_argument("--benchmarks", type=Path, help="where results go; default: benchmarks/tabletop (-gpu)")
    parser.add_argument("--summary", action="store_true", help="write tables and plots of what is there, run nothing")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    suffix = "" if arguments.preset == "cpu" else f"-{arguments.preset}"
    out = (arguments.out or ROOT / "runs" / f"experiment{suffix}").resolve()
    benchmarks = arguments.benchmarks or ROOT / "benchmarks" / f"tabletop{suffix}"
    if not arguments.summary:
        from examples.tabletop.demo import prepare

        prepare(preset.cache, preset.size, preset.world)
        with ThreadPoolExecutor(arguments.jobs or preset.jobs) as queue:
            bases = {seed: queue.submit(make_base, preset, out, seed) for seed in arguments.seeds}

            def one(job: tuple[int, str]) -> None:
                seed, arm = job
                seconds = execute(out / f"{arm}-{seed}", seed, arm_options(preset, arm, bases[seed].result()))
                print(f"{arm}, seed {seed}: {seconds:.0f} s", flush=True)

            # Seed by seed, so that an interrupted experiment has whole comparisons.
            list(queue.map(one, [(seed, arm) for seed in arguments.seeds for arm in arguments.arms]))
    from examples.tabletop.experiment_summary import summarise

    print(summarise(out, {name: arm.title for name, arm in ARMS.items()}, benchmarks, arguments.preset))
    return 0


if __name__ == "__main__":
    sys.exit(main())
