"""The demo: a model that learns to watch a table, in two loops of deliberate practice on two CPU cores.

    python examples/tabletop/demo.py [--run DIR] [--seed N] [--tensor-parallel] [flags of dppo_mcore.train]

Clips, manifests and the random checkpoint are made first (once, under .cache/tabletop). Training is the product's own:
`torchrun -m dppo_mcore.train --config examples/tiny.yaml`. Stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.tabletop.make_world import WorldOptions, make_world  # noqa: E402  after the path

CACHE = ROOT / ".cache" / "tabletop"
WORLD = WorldOptions(clips_base=4000, base_conversations=8000, base_consistent=0.7, camera_share=0.1)
CONFIG = "examples/tiny.yaml"


def prepare(cache: Path = CACHE, size: str = "small", world: WorldOptions = WORLD) -> None:
    """Make the data set and the random checkpoint where they aren't there yet, each whole or not at all."""
    from examples.tabletop.make_base import make_base

    began = time.monotonic()
    summary = make_world(cache / "world", world, workers=os.cpu_count() or 2)
    base, unfinished = cache / "base", cache / "base.unfinished"
    if not (base / "model.safetensors").exists():
        make_base(unfinished, size=size)
        shutil.rmtree(base, ignore_errors=True)
        unfinished.replace(base)
    print(f"tabletop: {summary['clips']} clips, {summary['rows']['pool']} questions to practise on, "
          f"{summary['rows']['eval']} held out; {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip


def train(run: Path, ranks: int, flags: list[str]) -> int:
    """Run the metaloop under torchrun; returns its exit status."""
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false",
                   "HF_HUB_OFFLINE": "1", **os.environ}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               "-m", "dppo_mcore.train", "--config", CONFIG, "--run-folder", str(run), *flags]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def table(run: Path) -> str:
    """Held-out success by objective after each phase, in percent with 95% intervals."""
    from dppo_mcore.report.overview import evaluations
    from dppo_mcore.report.read import open_run

    opened = open_run(run)
    found = evaluations(opened)
    opened.close()
    held_out = {entry["phase"]: entry for entry in found if entry["name"] == "eval"}
    general = {entry["phase"]: entry for entry in found if entry["name"] == "eval-general"}
    if not held_out:
        return "no evaluation yet"
    objectives = sorted(next(iter(held_out.values()))["objective"])
    rows = [["after", "all", *objectives, "general"]]
    for phase, entry in held_out.items():
        shares = [entry["all"], *(entry["objective"][name] for name in objectives)]
        cells = [f"{100 * s['p']:.0f} ({100 * s['low']:.0f}-{100 * s['high']:.0f})" for s in shares]
        cells.append(f"{100 * general[phase]['all']['p']:.0f}" if phase in general else "")
        rows.append([phase, *cells])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> int:
    """Prepare, train, print the table and the report's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tensor-parallel", action="store_true", help="two ranks share each layer, not the data")
    arguments, flags = parser.parse_known_args()
    began = time.monotonic()
    prepare()
    if arguments.tensor_parallel:
        flags += ["--tensor-model-parallel-size", "2"]
    status = train(arguments.run, 2, ["--seed", str(arguments.seed), *flags])
    if status:
        return status
    from dppo_mcore.report.page import write

    run = ROOT / arguments.run
    print(f"\nHeld-out success in percent, with 95% intervals\n{table(run)}\n")
    print(f"report: {write(run)}\n{time.monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
