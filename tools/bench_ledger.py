"""How fast the ledger takes rollouts in, and answers what the method asks of it.

    python tools/bench_ledger.py [--rollouts 1000000] [--folder DIR] [--json FILE]

Rollouts come as in a run: steps of 32 prompts with 8 answers each, every answer with text, token ids and log-probs,
one transaction a step. Rates are over the whole of the writing, fsync included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dppo_mcore.practice.difficulty import make_buffer
from dppo_mcore.practice.ledger import Ledger, PhasePlan
from dppo_mcore.practice.ledger_schema import file_system
from dppo_mcore.practice.stagnation import Stagnation
from dppo_mcore.types import Rollout, Sample, ScoredRollout, Turn

PROMPTS, GROUP, TOKENS = 32, 8, 48
PHASE_STEPS = 500
POOL = 100_000
TASKS = ("affordance", "counting", "temporal", "success", "planning", "prediction")


def answers(rng: np.random.Generator) -> list[ScoredRollout]:
    """A step's answers, none alike; used again for other samples (they are stored one by one all the same)."""
    ids_RT = rng.integers(0, 151_000, (PROMPTS * GROUP, TOKENS)).tolist()
    logprobs_RT = rng.exponential(1.0, (PROMPTS * GROUP, TOKENS)).astype(np.float32).tolist()
    wins_R = (rng.random(PROMPTS * GROUP) < 0.4).tolist()
    made = []
    for row, win in enumerate(wins_R):
        text = f"<think>{' '.join(map(str, ids_RT[row]))}</think><answer>{row}</answer>"
        rollout = Rollout("", row % GROUP, tuple(ids_RT[row]), tuple(logprobs_RT[row]), text, "stop", ((1, 0, TOKENS),))
        made.append(ScoredRollout(rollout, 0.1 + 0.9 * win, {"format": 1.0, "task": float(win)}, win))
    return made


def given_to(names: list[str], made: list[ScoredRollout]) -> list[ScoredRollout]:
    """The answers as those of these samples."""
    return [replace(one, rollout=replace(one.rollout, sample_id=names[row // GROUP])) for row, one in enumerate(made)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--folder", default="")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
        report = bench(Path(folder) / "ledger.sqlite", arguments.rollouts)
    print(f"{'rollouts':28} {'seconds':>9} {'rate':>16}")
    for row in report["rows"]:
        print(f"{row['name']:28} {row['seconds']:9.3f} {row['rate']:>16}")
    print(f"write rate / required 5,000 per s: {report['write_ratio']:.2f} x")
    print(f"difficulty query / allowed 2 s: {report['query_ratio']:.3f} x")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))


def bench(path: Path, rollouts: int) -> dict[str, Any]:
    """Write and ask; returns the table."""
    rng = np.random.default_rng(0)
    samples = [
        Sample(f"pool/{i:07}", TASKS[i % 6], (Turn("user", f"Question {i}?"),), dimension=f"dimension {i % 9}", gold=i)
        for i in range(POOL)
    ]
    steps = -(-rollouts // (PROMPTS * GROUP))
    plan = [PhasePlan(f"{n + 1}-1 RL", n + 1, "rl", 32.0) for n in range(-(-steps // PHASE_STEPS))]
    ledger = Ledger(path)
    ledger.plan(plan)
    registering, _ = timed(lambda: ledger.add_samples(samples, "rl"))
    writing = 0.0
    bank = [answers(rng) for _ in range(16)]
    for step in range(steps):
        names = [samples[i].id for i in rng.choice(POOL, PROMPTS, replace=False)]
        made = given_to(names, bank[step % len(bank)])
        phase, number = plan[step // PHASE_STEPS].name, step % PHASE_STEPS
        seconds, _ = timed(lambda p=phase, n=number, made=made: ledger.record_rollouts(p, n, made))
        writing += seconds
    count = steps * PROMPTS * GROUP
    last = plan[-1].name
    rates, counts = timed(ledger.success_rates)
    tagged, rows = timed(lambda: ledger.samples("rl"))
    buffer, _ = timed(lambda: make_buffer(rows.values(), counts, last_tries=ledger.last_tries()))
    score, _ = timed(lambda: Stagnation().from_groups(ledger.groups(last)).verdict())
    read_back, groups = timed(lambda: ledger.rollouts(last, 0))
    history, _ = timed(lambda: ledger.rollouts_of(next(iter(groups))))
    size = path.stat().st_size / 2**20
    ledger.close()
    table = [
        ("register 100,000 samples", registering, f"{POOL / registering:,.0f}/s"),
        (f"write {count:,} rollouts", writing, f"{count / writing:,.0f}/s"),
        ("success rate of every sample", rates, f"{len(counts):,} samples"),
        ("tags of every sample", tagged, f"{len(rows):,} samples"),
        ("make the buffer", buffer, ""),
        ("stagnation of a whole phase", score, ""),
        ("read one step back", read_back, f"{PROMPTS * GROUP} rollouts"),
        ("all answers of one sample", history, ""),
    ]
    return {
        "environment": {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "cores": os.cpu_count(),
            "file system": file_system(path),
        },
        "rows": [{"name": name, "seconds": seconds, "rate": rate} for name, seconds, rate in table],
        "rollouts": count,
        "mebibytes": size,
        "write_ratio": count / writing / 5000,
        "query_ratio": rates / 2,
    }


if __name__ == "__main__":
    main()
