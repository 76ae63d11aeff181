"""Every check and benchmark that needs a GPU, in one command on a bare machine: `python tools/gpu_check.py --out DIR`.

Needs torch and triton only; what else is missing is named and skipped. Each step is a process of its own with a time
limit, its output goes to DIR/STEP.log and its figures to DIR/STEP.json; DIR/summary.json says how each ended. All
steps together stay under nine minutes. To add a check, add a `Step`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 530
KERNEL_TESTS = (
    "tests/kernels/test_linear_logprob.py",
    "tests/kernels/test_policy_loss.py",
    "tests/kernels/test_linear_policy_loss.py",
    "tests/kernels/test_group_advantages.py",
    "tests/kernels/test_memory_and_launches.py",
)


@dataclass(frozen=True)
class Step:
    """One check: a command run in the repository root. `{out}` becomes the output folder, `{python}` this Python."""

    name: str
    command: tuple[str, ...]
    seconds: int
    """Its time limit."""
    needs: tuple[str, ...] = ("torch", "triton")
    """Modules without which it is skipped."""
    optional: tuple[str, ...] = ()
    """Modules it uses where they are there; named when missing."""


def steps(options: argparse.Namespace) -> list[Step]:
    """What runs, in this order: exactness first, then speed."""
    verl = ("--verl", options.verl) if options.verl else ()
    jobs = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    head = ("{python}", "tools/bench_head.py", "--json", "{out}/head.json", "--rounds", "12", *verl)
    return [
        Step("environment", ("nvidia-smi",), 20, needs=()),
        Step("kernels-native", ("{python}", "tools/bare_pytest.py", "--jobs", jobs, *KERNEL_TESTS), 200),
        Step("ipc", ("{python}", "tools/check_ipc.py", "--json", "{out}/ipc.json"), 60, needs=("torch",)),
        Step("head", head, 180, optional=("liger_kernel", "cut_cross_entropy")),
        Step("policy-loss", ("{python}", "tools/bench_policy_loss.py", "--json", "{out}/policy-loss.json"), 60),
        Step("advantages", ("{python}", "tools/bench_advantages.py", "--json", "{out}/advantages.json"), 40),
    ]


def run(step: Step, out: Path, seconds: float) -> dict[str, object]:
    """How one step ended."""
    missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
    if missing:
        return dict(step=step.name, result=f"skipped: no {', '.join(missing)}")
    without = [name for name in step.optional if importlib.util.find_spec(name) is None]
    if seconds < 10:
        return dict(step=step.name, result="skipped: no time left")
    command = [part.format(out=out, python=sys.executable) for part in step.command]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, paths)))
    environment.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("w") as file:
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            code = child.wait(timeout=min(seconds, step.seconds))
            result = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with its own children: the next step measures alone
            child.wait()
            result = f"stopped after {min(seconds, step.seconds):.0f} s"
        except FileNotFoundError:
            result = f"skipped: no {command[0]}"
    ended = dict(step=step.name, result=result, seconds=round(time.monotonic() - began, 1))
    return ended | (dict(without=without) if without else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for logs and figures")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps only")
    parser.add_argument("--verl", metavar="FILE", help="verl's linear_cross_entropy.py, to compare with")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    ended = time.monotonic() + TOTAL_SECONDS
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; run it on a machine with an H100 or H200")
        sys.exit(1)
    results = []
    for step in steps(options):
        if options.only and step.name not in options.only:
            continue
        result = run(step, out, ended - time.monotonic())
        print(json.dumps(result), flush=True)
        log = out / f"{step.name}.log"
        if log.exists():
            print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-40:]), flush=True)
        results.append(result)
    about = dict(python=platform.python_version(), torch=torch.__version__, gpu=torch.cuda.get_device_name())
    (out / "summary.json").write_text(json.dumps(dict(about=about, steps=results), indent=1) + "\n")
    sys.exit(any(str(result["result"]).startswith(("failed", "stopped")) for result in results))


if __name__ == "__main__":
    main()
