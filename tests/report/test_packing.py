"""What the page reads is JSON, whatever the run's numbers are."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from pathlib import Path

import pytest

from dppo_mcore.practice.ledger import Ledger, PhasePlan
from dppo_mcore.report.blocks import Limits
from dppo_mcore.report.packing import as_json
from dppo_mcore.report.page import build
from dppo_mcore.types import Rollout, Sample, ScoredRollout, Turn


def strict(text: str) -> object:
    """JSON as a browser reads it: Python alone takes NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_numbers_that_json_lacks_stand_by_their_names() -> None:
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": None, "c": "NaN"}
    assert strict(as_json(value)) == {"a": [1.5, "NaN", ["Infinity", "-Infinity"]], "b": None, "c": "NaN"}


def test_a_page_of_a_run_with_such_numbers_is_json_throughout(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_samples([Sample("odd", "exact", (Turn("user", "?"),), gold=math.nan)], "rl")
        ledger.plan([PhasePlan("1-1 RL", 1, "rl")])
        answer = Rollout("odd", 0, (1,), (-0.1,), "!", "stop", ((1, 0, 1),))
        ledger.record_rollouts(
            "1-1 RL", 0, [ScoredRollout(answer, math.inf, {"task": 1.0, "odd": math.nan}, False, None)]
        )
        ledger.decide("1-1 RL", 1, "stagnation", {"score": math.nan}, "a collapsed run")
    page = build(tmp_path, Limits(frame_samples=0))
    data = re.search(r"^const DATA = (.*);$", page, re.MULTILINE)
    assert data and strict(data.group(1))["decisions"][0]["numbers"] == {"score": "NaN"}  # type: ignore[index]
    block = re.search(r'id="samples-0">([^<]*)<', page)
    assert block
    sample = strict(gzip.decompress(base64.b64decode(block.group(1))).decode())["0"]  # type: ignore[index]
    assert sample["gold"] == "NaN" and sample["rollouts"][0][3] == "Infinity"
    assert sample["rollouts"][0][7] == {"task": 1.0, "odd": "NaN"}
