"""The paper's contrasts at small scale: arms from one base, at equal budgets, over several seeds.

    python examples/tabletop/experiment.py [--arms dppo rl-only ...] [--seeds 1 2 3] [--jobs 2] [--out DIR]

Every arm is the product's own training with other options; a finished run is not run again, a stopped one goes on, so
the same command completes what is missing. `--summary` only writes tables and plots from what is there.
Budgets: arms with RL see about the same number of rollouts (`rl-only` has more RL steps in place of buffers and
mining), arms with SFT the same number of SFT steps. What each really used, labels included, stands in the table.
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

CONFIG = "examples/tiny.yaml"
BASE_STEPS = 900
RL_STEPS = 40
"""RL steps per loop of an arm with two loops."""
COMMON = {
    "buffer-samples": 1200,
    "rl-min-steps": RL_STEPS,
    "rl-max-steps": RL_STEPS,
    "stagnation-threshold": 1.0,
    "last-sft": True,
    "eval-samples": 360,
    "sft-max-steps": 150,
    "save-interval": 60,
    "log-interval": 10,
}
"""Lengths are fixed in every arm: a phase that may end itself would make budgets unequal."""
RL_ONLY_STEPS = 60
"""Per loop: 20 steps of 48 x 8 answers stand for one loop's buffer and mining."""


@dataclass(frozen=True)
class Arm:
    """A contrast: what it is called in tables, and its options beside the common ones."""

    title: str
    options: dict[str, object]


ARMS = {
    "dppo": Arm("DPPO (RL and SFT in turn, by difficulty, anchors)", {"anchor-share": 0.15}),
    "rl-only": Arm("RL only, random sampling",
                   {"mode": "rl-only", "sampling": "random", "rl-max-steps": RL_ONLY_STEPS,
                    "rl-min-steps": RL_ONLY_STEPS}),
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


def make_base(out: Path, seed: int) -> Path:
    """The base all arms of a seed start from: the checkpoint after the first SFT, before the run's one RL step."""
    run = out / f"base-{seed}"
    options = {"mode": "rl-only", "loops": 1, "sampling": "random", "base-sft-steps": BASE_STEPS, "rl-min-steps": 1,
               "rl-max-steps": 1, "keep-checkpoints": 4, "eval-samples": COMMON["eval-samples"]}  # fmt: skip
    execute(run, seed, options)
    return run / "checkpoints" / f"step-{BASE_STEPS:08d}"


def main() -> int:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a process each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "experiment", help="folder of the runs")
    parser.add_argument("--benchmarks", type=Path, default=ROOT / "benchmarks" / "tabletop", help="where results go")
    parser.add_argument("--summary", action="store_true", help="write tables and plots of what is there, run nothing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if not arguments.summary:
        from examples.tabletop.demo import prepare

        prepare()
        with ThreadPoolExecutor(arguments.jobs) as queue:
            bases = {seed: queue.submit(make_base, out, seed) for seed in arguments.seeds}

            def one(job: tuple[int, str]) -> None:
                seed, arm = job
                options = {**COMMON, "load": bases[seed].result(), "base-sft-steps": 0, **ARMS[arm].options}
                seconds = execute(out / f"{arm}-{seed}", seed, options)
                print(f"{arm}, seed {seed}: {seconds:.0f} s", flush=True)

            # Seed by seed, so that an interrupted experiment has whole comparisons.
            list(queue.map(one, [(seed, arm) for seed in arguments.seeds for arm in arguments.arms]))
    from examples.tabletop.experiment_summary import summarise

    print(summarise(out, {name: arm.title for name, arm in ARMS.items()}, arguments.benchmarks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
