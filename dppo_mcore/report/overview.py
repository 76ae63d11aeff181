"""What the report says about the run as a whole, as plain JSON values."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

import yaml

from dppo_mcore.report.curves import curves
from dppo_mcore.report.read import Run
from dppo_mcore.report.statistics import MOST_POINTS, thin, wilson

AS_OF_COPY = "The run keeps its ledger to itself: what follows is as of its last finished phase."
AGGREGATES = ("mean", "all", "freeze")
"""Of `stagnation_aggregate`, the default first."""
MOST_QUARANTINED = 500
"""Media set aside that are listed."""
RATE_CLASSES = ("never", "up to 25%", "up to 50%", "up to 75%", "below 100%", "always")


def rate_class(successes: int, trials: int) -> int:
    """Which of `RATE_CLASSES` a success rate falls into."""
    if successes == 0:
        return 0
    if successes == trials:
        return 5
    return min(4, 1 + int(4 * successes / trials - 1e-9))


def newest_trace(run: Run, logged: float = 0.0) -> float:
    """When the run last wrote something that bears a time: to the ledger, or as figures (`logged`)."""
    latest = ["SELECT written_at FROM rollouts ORDER BY key DESC LIMIT 1"]
    latest += [f"SELECT max(written_at) FROM {table}" for table in ("teacher_answers", "evaluations", "decisions")]
    found = (row[0] for query in latest for row in run.rows(query))
    return float(max([logged, *(time for time in found if time is not None)]))


def phases(run: Run, logged: float = 0.0) -> list[dict[str, Any]]:
    """The schedule with what each phase did and why it ended.

    `until` is a phase's end; of one that isn't done the last sign of life, as the run may have been killed since.
    """
    sign = newest_trace(run, logged)
    rollouts = dict(run.rows("SELECT phase, sum(trials) FROM success GROUP BY phase"))
    names = "key, name, loop, kind, horizon, state, start_step, end_step, reason, started_at, ended_at"
    keys = [name.strip() for name in names.split(",")]
    table = [dict(zip(keys, row, strict=True)) for row in run.rows(f"SELECT {names} FROM phases ORDER BY key")]
    for row in table:
        row["rollouts"] = rollouts.get(row.pop("key"), 0)
        row["until"] = row["started_at"] and (row["ended_at"] or max(row["started_at"], sign))
    return table


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Held-out success of every evaluation, whole, by objective and by dimension, with intervals."""
    found: dict[tuple[int, int, str], dict[str, Any]] = {}
    counts = (
        "SELECT a.phase, a.step, a.name, s.objective, s.dimension, count(*), sum(a.success), avg(a.reward) "
        "FROM evaluation_answers a JOIN samples s ON s.key = a.sample GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3"
    )
    for phase, step, name, objective, dimension, count, successes, _ in run.rows(counts):
        entry = found.setdefault(
            (phase, step, name),
            {"phase": run.phases[phase], "step": step, "name": name, "all": [0, 0], "objective": {}, "dimension": {}},
        )
        for group, key in (("objective", objective), ("dimension", dimension)):
            if key:
                tally = entry[group].setdefault(key, [0, 0])
                tally[0] += successes
                tally[1] += count
        entry["all"][0] += successes
        entry["all"][1] += count
    for entry in found.values():
        entry["all"] = _share(*entry["all"])
        for group in ("objective", "dimension"):
            entry[group] = {key: _share(*tally) for key, tally in entry[group].items()}
    return list(found.values())


def _share(successes: int, count: int) -> dict[str, Any]:
    low, high = wilson(successes, count)
    return {"n": count, "p": successes / count, "low": low, "high": high}


def success_over_steps(run: Run) -> list[dict[str, Any]]:
    """Per phase the distribution of success rates and the mean success of each objective, by its steps from 1."""
    found = []
    for key, name in run.phases.items():
        groups = run.rows(
            "SELECT u.step + 1, s.objective, u.trials, u.successes FROM success u JOIN samples s ON s.key = u.sample "
            "WHERE u.phase = ? ORDER BY u.step",
            key,
        )
        if not groups:
            continue
        shares: dict[int, list[int]] = defaultdict(lambda: [0] * len(RATE_CLASSES))
        sums: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        for step, objective, trials, successes in groups:
            shares[step][rate_class(successes, trials)] += 1
            tally = sums[objective][step]
            tally[0] += successes
            tally[1] += trials
        found.append({"phase": name, "steps": _merge_steps(shares), "groups": len(groups),
                      "objective": {o: thin([(s, a / b) for s, (a, b) in by.items()], MOST_POINTS // 4)
                                    for o, by in sums.items()}})  # fmt: skip
    return found


def _merge_steps(shares: dict[int, list[int]]) -> list[tuple[int, list[int]]]:
    """At most 120 columns; neighbouring steps are added up."""
    steps = sorted(shares)
    size = max(1, -(-len(steps) // 120))
    chunks = [steps[k : k + size] for k in range(0, len(steps), size)]
    return [(chunk[-1], [sum(column) for column in zip(*(shares[s] for s in chunk), strict=True)]) for chunk in chunks]


def decisions(run: Run) -> list[dict[str, Any]]:
    """Every decision with its numbers, in order."""
    query = "SELECT phase, step, kind, numbers, reason FROM decisions ORDER BY phase, step, kind"
    return [
        {"phase": run.phases[phase], "step": step, "kind": kind, "numbers": json.loads(numbers), "reason": reason}
        for phase, step, kind, numbers, reason in run.rows(query)
    ]


def corpus(run: Run) -> dict[str, Any]:
    """Composition of every SFT corpus, what the teacher did, and what became of each buffer."""
    items = run.rows(
        "SELECT i.phase, i.source, s.objective, count(*), sum(i.tokens) FROM sft_items i "
        "JOIN samples s ON s.key = i.sample GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    )
    teacher = run.rows(
        "SELECT phase, count(DISTINCT sample), count(*), sum(success), sum(kept), sum(error IS NOT NULL) "
        "FROM teacher_answers GROUP BY phase ORDER BY phase"
    )
    buffers = run.rows("SELECT phase, status, count(*) FROM buffers GROUP BY 1, 2 ORDER BY 1, 2")
    return {
        "items": [{"phase": run.phases[p], "source": source, "objective": objective, "count": n, "tokens": tokens}
                  for p, source, objective, n, tokens in items],
        "teacher": [{"phase": run.phases[p], "samples": samples, "answers": answers, "verified": right, "kept": kept,
                     "errors": errors} for p, samples, answers, right, kept, errors in teacher],
        "buffers": [{"phase": run.phases[p], "status": status, "count": n} for p, status, n in buffers],
    }  # fmt: skip


def _sections(config: str) -> dict[str, dict[str, Any]]:
    """The configuration by section; empty where it isn't one."""
    try:
        found = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    found = found if isinstance(found, dict) else {}
    return {name: section for name, section in found.items() if isinstance(section, dict)}


def _stagnation(practice: dict[str, Any]) -> dict[str, Any]:
    """What ends an RL phase: the score, and whose it is."""
    threshold, aggregate = practice.get("stagnation_threshold"), practice.get("stagnation_aggregate")
    return {
        "threshold": threshold if isinstance(threshold, int | float) and math.isfinite(threshold) else 0.7,
        "aggregate": aggregate if aggregate in AGGREGATES else AGGREGATES[0],
    }


def facts(run: Run, plan: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts for the header, and the resolved configuration."""

    def one(query: str) -> Any:
        return run.rows(query)[0][0] or 0

    begun = [phase for phase in plan if phase["started_at"]]
    file = run.folder / "config.yaml"
    config = file.read_text() if file.exists() else ""
    sections = _sections(config)
    quarantine = run.rows("SELECT path, reason FROM quarantine ORDER BY path LIMIT ?", MOST_QUARANTINED)
    note = str(sections.get("run", {}).get("note") or "")
    return {
        "name": run.folder.resolve().name,
        "rollouts": one("SELECT sum(trials) FROM success"),
        "samples": one("SELECT count(*) FROM samples"),
        "tokens": one("SELECT sum(tokens) FROM rollouts"),
        "started": min((phase["started_at"] for phase in begun), default=0),
        "ended": max((phase["until"] for phase in begun), default=0),
        "quarantine": [{"path": path, "reason": reason} for path, reason in quarantine],
        "quarantined": one("SELECT count(*) FROM quarantine"),
        "config": config,
        "stagnation": _stagnation(sections.get("practice", {})),
        "note": " ".join(filter(None, (note, AS_OF_COPY if run.as_of_copy else ""))),
    }


def overview(run: Run) -> dict[str, Any]:
    """All of it."""
    drawn = curves(run)
    plan = phases(run, drawn.pop("written"))
    return {
        "facts": facts(run, plan),
        "phases": plan,
        "evaluations": evaluations(run),
        "success": success_over_steps(run),
        "rateClasses": RATE_CLASSES,
        "decisions": decisions(run),
        "curves": drawn,
        "corpus": corpus(run),
    }
