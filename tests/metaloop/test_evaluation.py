"""Evaluation: intervals, tables by objective, dimension and source, forgetting, and the command on real weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dppo_mcore.evaluate import parse, table
from dppo_mcore.metaloop.evaluation import first_success, flat_metrics, summarise, wilson
from dppo_mcore.practice.ledger import Evaluation
from dppo_mcore.types import Rollout, Sample, ScoredRollout
from tests.metaloop import harness


def answered(sample: Sample, task: float, form: float) -> ScoredRollout:
    parts = {"format": form, "task": task}
    return ScoredRollout(Rollout(sample.id, 0, (1,), (0.0,), "x", "stop"), 0.1 * form + 0.9 * task, parts, task >= 0.5)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Worked out from (p + z2/2n +- z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n), z = 1.959964.
    [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (50, 100, 0.404, 0.596), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-4)


def test_summary_by_objective_dimension_and_source() -> None:
    kinds = [("counting", "D1", "a"), ("counting", "D2", "b"), ("success", "D1", "b"), ("success", "", "")]
    samples = [Sample(f"s{i}", o, (), dimension=d, source=s) for i, (o, d, s) in enumerate(kinds)]
    answers = [answered(s, task, 1.0) for s, task in zip(samples, (0.6, 0.4, 1.0, 0.0), strict=True)]
    found = summarise(samples, answers)
    assert found["all"]["n"] == 4 and found["all"]["success"] == 0.5 and found["all"]["task"] == pytest.approx(0.5)
    assert {k: (v["n"], v["success"]) for k, v in found["objective"].items()} == {
        "counting": (2, 0.5), "success": (2, 0.5),
    }  # fmt: skip
    assert {k: (v["n"], v["success"]) for k, v in found["dimension"].items()} == {
        "D1": (2, 1.0), "D2": (1, 0.0), "none": (1, 0.0),
    }  # fmt: skip
    assert {k: v["success"] for k, v in found["source"].items()} == {"a": 1.0, "b": 0.5, "none": 0.0}
    lines = table(found).splitlines()
    assert len(lines) == 1 + 2 + 3 + 3 + 1 and lines[-1].split()[:3] == ["all", "4", "0.500"]
    assert "[0.150, 0.850]" in lines[-1]


def test_forgetting_is_counted_from_the_first_evaluation() -> None:
    samples = [Sample(f"s{i}", "exact", ()) for i in range(4)]
    after = summarise(samples, [answered(s, float(i < 1), 1.0) for i, s in enumerate(samples)])
    before = summarise(samples, [answered(s, float(i < 3), 1.0) for i, s in enumerate(samples)])
    history = [Evaluation("1-1 buffer", 0, "eval-general", before), Evaluation("1-1 RL", 9, "eval-general", after)]
    started = first_success(history)
    assert started == {"eval-general": 0.75}
    assert flat_metrics({"eval-general": after}, started) == {"eval/general": 0.25, "eval/forgotten": 0.5}


def test_a_pool_without_any_answer() -> None:
    empty = summarise([], [])
    assert flat_metrics({"eval": empty, "eval-general": empty}, {}) == {}
    assert table(empty).splitlines()[-1].split() == ["all", "0"]


def test_the_output_is_asked_for() -> None:
    with pytest.raises(ValueError, match="--out"):
        parse(["--model", "m", "--data", "d"])
    with pytest.raises(ValueError, match="data"):
        parse(["--model", "m", "--out", "o.json"])


def test_whose_weights(tmp_path: Path) -> None:
    """A checkpoint that the run's file names is evaluated, unless the command names a model and no checkpoint."""
    file = tmp_path / "config.yaml"
    file.write_text("model: base\nload: start\ndata: d\n")
    for flags, expected in (
        ([], ("base", "start")),
        (["--load=end"], ("base", "end")),
        (["--model", "exported"], ("exported", "")),
        (["--model", "exported", "--load", "end"], ("exported", "end")),
    ):
        config, _ = parse(["--config", str(file), "--out", "o.json", *flags])
        assert (config.run.model, config.run.load) == expected


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "dppo_mcore.evaluate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=harness.environment(), cwd=harness.ROOT)


def test_the_command_on_real_weights(world: Path, tmp_path: Path) -> None:
    """Rows of a manifest with one damaged clip: answered greedily and summed up, the damaged one left out."""
    rows = [json.loads(line) for line in (world / "eval.jsonl").read_text().splitlines()[:12]]
    rows[5] |= {"id": "damaged", "media": [{"type": "video", "path": "clips/none.webm"}]}
    data, out = tmp_path / "eval.jsonl", tmp_path / "out.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {"dtype": "fp32", "fps": 0.5, "max-frames": 16, "min-pixels": 3136, "max-pixels": 3136,
               "max-prompt-tokens": 512, "max-response-tokens": 8, "data-workers": 0, "reward-workers": 0}  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    arguments = ["--model", world / "base", "--data", data, "--media-root", world, "--out", out, *flags]
    done = run(*arguments, "--engine", "inprocess")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    assert [row["id"] for row in found["answers"]] == [row["id"] for row in rows if row["id"] != "damaged"]
    assert (found["summary"]["all"]["n"], found["skipped"]) == (11, 1)
    assert Counter(row["objective"] for row in found["answers"]) == {
        name: entry["n"] for name, entry in found["summary"]["objective"].items()
    }
    assert all(0 <= e["low"] <= e["success"] <= e["high"] <= 1 for e in found["summary"]["dimension"].values())
    assert set(found["summary"]["source"]) == {"tabletop-eval"}
    assert done.stdout.splitlines()[-1].split()[:2] == ["all", "11"]
    again = run(*arguments[: -len(flags)], *flags, "--seed", 7)
    assert again.returncode == 0 and json.loads(out.read_text())["answers"] == found["answers"]  # greedy: no chance


def test_the_command_on_data_that_cannot_be_used(world: Path, tmp_path: Path) -> None:
    """One line and status 1: no clip where the media root says, or an objective that nothing scores."""
    row = json.loads((world / "eval.jsonl").read_text().splitlines()[0])
    data, out = tmp_path / "eval.jsonl", tmp_path / "out.json"
    arguments = ["--model", world / "base", "--data", data, "--out", out, "--data-workers", 0]
    for change, message in (
        ({}, f"error: data: none of 1 samples can be used, the first: sample '{row['id']}': {tmp_path}/"),
        ({"objective": "zzz"}, f"error: pool eval ({data}): no scorer for objective 'zzz' (1 rows); known: "),
    ):
        data.write_text(json.dumps(row | change) + "\n")
        done = run(*arguments)
        assert done.returncode == 1 and not out.exists()
        assert done.stderr.splitlines()[-1].startswith(message) and "Traceback" not in done.stderr, done.stderr
