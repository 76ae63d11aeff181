"""Check a manifest before training on it.

    python tools/check_data.py --data POOL.jsonl [--eval EVAL.jsonl ...] [--objectives FILE] [--depth decode]

Reports rows by objective and dimension, durations, refused rows, missing and broken media, duplicates, and samples
that an evaluation manifest holds too. Exit status 1 if anything is refused, broken or leaked, or if an objective has
no scorer.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dppo_mcore.config import DataConfig, PracticeConfig
from dppo_mcore.data.check import GEOMETRY, Report, check_manifest
from dppo_mcore.data.errors import DataError
from dppo_mcore.data.manifest import read_manifest
from dppo_mcore.data.patches import load_geometry
from dppo_mcore.rewards.registry import load_objectives


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="manifest to check")
    parser.add_argument("--media-root", default="", help="root of relative media paths (default: manifest's folder)")
    parser.add_argument("--eval", nargs="*", default=[], help="evaluation manifests that must share nothing with it")
    parser.add_argument("--objectives", default="", help="Python file with further @objective scorers")
    parser.add_argument(
        "--only-learnt", action="store_true", help="for base_data and general_data: no scorer is needed"
    )
    parser.add_argument("--depth", choices=("rows", "probe", "decode"), default="probe")
    parser.add_argument("--workers", type=int, default=4, help="threads that open media")
    parser.add_argument(
        "--fps", type=float, default=DataConfig.fps, help="frames per second to decode with --depth decode"
    )
    parser.add_argument("--max-frames", type=int, default=DataConfig.max_frames)
    parser.add_argument(
        "--horizons", type=float, nargs="+", default=PracticeConfig.horizons, help="seconds of a clip that loops see"
    )
    parser.add_argument("--model", default="", help="checkpoint whose patches the frames are sized for")
    parser.add_argument("--limit", type=int, default=20, help="findings of a kind to print (the JSON has all)")
    parser.add_argument("--json", default="", help="write the whole report here")
    arguments = parser.parse_args()
    if arguments.model and not Path(arguments.model).is_dir():
        parser.error(f"model: no folder {arguments.model}")
    try:
        manifest = read_manifest(arguments.data, arguments.media_root)
        evaluations = [read_manifest(path, arguments.media_root) for path in arguments.eval]
        load_objectives(arguments.objectives)
    except (DataError, FileNotFoundError) as error:
        parser.error(str(error))
    data = DataConfig(fps=arguments.fps, max_frames=arguments.max_frames)
    scored = not arguments.only_learnt
    geometry = load_geometry(arguments.model) if arguments.model else GEOMETRY
    report = check_manifest(
        manifest, evaluations, arguments.depth, data, arguments.workers, scored, arguments.horizons, geometry
    )
    print_report(report, arguments.limit)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**asdict(report), "ok": report.ok()}, indent=1))
    return 0 if report.ok() else 1


def print_report(report: Report, limit: int) -> None:
    """The findings as text."""
    print(f"{report.file}: {report.rows} rows taken, {len(report.refused)} refused, {len(report.damaged)} damaged")
    if report.scorers:
        print(f"{report.scorers}; --objectives FILE adds yours")
    table("objective", report.objectives)
    table("dimension", report.dimensions)
    table("source", report.sources)
    table("media", report.media)
    table(f"clips by duration ({report.seconds / 3600:.2f} h)", report.durations)
    reasons = Counter(item.reason for item in (*report.refused, *report.damaged))
    table("refused or damaged by reason", reasons)
    listing("refused", [f"{item.sample_id}: {item.detail}" for item in report.refused], limit)
    listing("damaged", [f"{d.sample_id}: {d.path}: {d.reason} {d.detail}".rstrip() for d in report.damaged], limit)
    listing("duplicates", [f"{one} repeats {other}" for one, other in report.duplicates], limit)
    listing(
        "leaks", [f"{leak.sample_id} is in {leak.file} as {leak.other_id} ({leak.why})" for leak in report.leaks], limit
    )


def table(title: str, counts: Any) -> None:
    """Counts, largest first."""
    if counts:
        print(f"\n{title}")
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            print(f"  {count:>9}  {name or '(none)'}")


def listing(title: str, lines: list[str], limit: int) -> None:
    """The first lines of a kind."""
    if lines:
        print(f"\n{title}: {len(lines)}")
        for line in lines[:limit]:
            print(f"  {line}")
        if len(lines) > limit:
            print(f"  and {len(lines) - limit} more (--limit, --json)")


if __name__ == "__main__":
    raise SystemExit(main())
