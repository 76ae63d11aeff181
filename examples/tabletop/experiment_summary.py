"""Tables and plots of the experiment, from the ledgers of its runs."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dppo_mcore.report.overview import evaluations
from dppo_mcore.report.read import open_run

COLOURS = ("#2563c9", "#c2570c", "#0f8a6a", "#b0307f", "#6a4fcf", "#866a00", "#5c6773")


@dataclass(frozen=True)
class Point:
    """A run at the end of a phase: what it had used, and how it did."""

    phase: str
    rollouts: int
    labels: int
    success: float
    objective: dict[str, float]
    general: float

    @property
    def planning(self) -> float:
        """Success at the objective that is withheld from the base."""
        return self.objective.get("planning", 0.0)


def points_of(run: Path) -> list[Point]:
    """Evaluations of a run with what was used up to each."""
    opened = open_run(run)
    order = {name: key for key, name in opened.phases.items()}
    rollouts = dict(opened.rows("SELECT phase, sum(trials) FROM success GROUP BY phase"))
    labels = dict(opened.rows("SELECT phase, sum(source IN ('weak', 'retrieved')) FROM sft_items GROUP BY phase"))
    found: dict[str, dict[str, Any]] = {}
    for entry in evaluations(opened):
        found.setdefault(entry["phase"], {})[entry["name"]] = entry
    opened.close()
    made = []
    for phase, sets in found.items():
        if "eval" not in sets:
            continue
        until = order[phase]
        whole = sets["eval"]
        made.append(
            Point(
                phase,
                sum(n for key, n in rollouts.items() if key <= until),
                sum(n for key, n in labels.items() if key <= until),
                whole["all"]["p"],
                {name: share["p"] for name, share in whole["objective"].items()},
                sets["eval-general"]["all"]["p"] if "eval-general" in sets else float("nan"),
            )
        )
    return made


def gather(out: Path, arms: dict[str, str]) -> dict[str, dict[int, list[Point]]]:
    """Points by arm and seed, of the runs that are there; the base's is put in front."""
    found: dict[str, dict[int, list[Point]]] = {}
    for arm in arms:
        for run in sorted(out.glob(f"{arm}-[0-9]*")):
            seed = int(run.name.removeprefix(f"{arm}-"))
            log = run / "experiment.log"
            if not log.exists() or "finished;" not in log.read_text():
                continue
            base = points_of(out / f"base-{seed}")[:1]
            found.setdefault(arm, {})[seed] = base + points_of(run)
    return found


def _mean(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def table(found: dict[str, dict[int, list[Point]]], arms: dict[str, str]) -> str:
    """Final success of each arm in percent, mean and standard deviation over seeds."""
    objectives = sorted(next(iter(next(iter(found.values())).values()))[0].objective)
    lines = [f"| arm | seeds | rollouts | labels | all | {' | '.join(objectives)} | general |"]
    lines.append("|" + "---|" * (len(objectives) + 6))
    starts = {seed: points[0] for by_seed in found.values() for seed, points in by_seed.items()}
    rows = [("base", list(starts.values()))]
    rows += [(arms[arm], [points[-1] for points in by_seed.values()]) for arm, by_seed in found.items()]
    for title, ends in rows:
        cells = [_mean([end.objective.get(name, 0.0) for end in ends]) for name in objectives]
        used = f"{statistics.mean(e.rollouts for e in ends):,.0f} | {statistics.mean(e.labels for e in ends):,.0f}"
        lines.append(f"| {title} | {len(ends)} | {used} | {_mean([e.success for e in ends])} | {' | '.join(cells)} | "
                     f"{_mean([e.general for e in ends])} |")  # fmt: skip
    return "\n".join(lines)


def plot(found: dict[str, dict[int, list[Point]]], arms: dict[str, str], field: str, title: str) -> str:
    """Mean over seeds after each phase against the rollouts used until then, an SVG."""
    width, height, left, top, bottom = 860, 340, 56, 40, 46
    right = 330
    most = max((points[-1].rollouts for by_seed in found.values() for points in by_seed.values()), default=1)
    x = lambda rollouts: left + rollouts * (width - left - right) / max(1, most)  # noqa: E731
    y = lambda share: height - bottom - share * (height - top - bottom)  # noqa: E731
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12" role="img" aria-label="{title}"><rect width="100%" height="100%" fill="#fff"/>'
             f'<text x="{left}" y="22" font-size="15" font-weight="600">{title}</text>']  # fmt: skip
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M{left},{y(share):.0f}H{width - right}" stroke="#dde3ea"/>'
                     f'<text x="{left - 8}" y="{y(share) + 4:.0f}" text-anchor="end">{share:.0%}</text>')  # fmt: skip
    tick = 10 ** max(0, len(str(most)) - 1)
    for mark in range(0, most + 1, tick):
        parts.append(f'<text x="{x(mark):.0f}" y="{height - 22}" text-anchor="middle">{mark:,}</text>')
    for number, (arm, by_seed) in enumerate(found.items()):
        colour = COLOURS[number % len(COLOURS)]
        lengths = min(len(points) for points in by_seed.values())
        mean = lambda name, k, by_seed=by_seed: statistics.mean(getattr(p[k], name) for p in by_seed.values())  # noqa: E731
        places = [(x(mean("rollouts", k)), y(mean(field, k))) for k in range(lengths)]
        path = " ".join(f"{'L' if k else 'M'}{at:.1f},{high:.1f}" for k, (at, high) in enumerate(places))
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        parts += [f'<circle cx="{at:.1f}" cy="{high:.1f}" r="3.4" fill="{colour}"/>' for at, high in places]
        row = top + 10 + 20 * number
        parts.append(f'<rect x="{width - right + 16}" y="{row - 9}" width="11" height="11" fill="{colour}"/>'
                     f'<text x="{width - right + 33}" y="{row + 1}">{arms[arm]}</text>')  # fmt: skip
    middle = (left + width - right) / 2
    caption = "rollouts used, buffers and mining included"
    parts.append(f'<text x="{middle:.0f}" y="{height - 6}" text-anchor="middle">{caption}</text>')
    return "\n".join([*parts, "</svg>"])


def summarise(out: Path, arms: dict[str, str], into: Path, preset: str = "cpu") -> str:
    """Write results.json, results.md and the plots; returns the table. Without a finished run nothing is written."""
    found = gather(out, arms)
    if not found:
        raise SystemExit(f"no finished run in {out}: nothing written to {into}")
    into.mkdir(parents=True, exist_ok=True)
    made = {
        "date": date.today().isoformat(),
        "command": f"python examples/tabletop/experiment.py --preset {preset}",
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers", "numpy")},
        "arms": {arm: {seed: [asdict(point) for point in points] for seed, points in by_seed.items()}
                 for arm, by_seed in found.items()},
    }  # fmt: skip
    (into / "results.json").write_text(json.dumps(made, indent=1))
    shown = table(found, arms)
    for field, title in (("success", "Held-out success"), ("planning", "Held-out planning, new to the base"),
                         ("general", "The general set (forgetting)")):  # fmt: skip
        (into / f"{field}.svg").write_text(plot(found, arms, field, title))
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    (into / "results.md").write_text(
        f"# Contrasts on the tabletop, {made['date']}\n\n`{made['command']}`; {versions}; {made['machine']}.\n\n"
        "Greedy held-out success in percent, mean ± standard deviation over seeds. Rollouts include buffers and "
        f"mining; labels are the weak and retrieved items of all corpora.\n\n{shown}\n\n"
        "![](success.svg)\n\n![](planning.svg)\n\n![](general.svg)\n"
    )
    return shown
