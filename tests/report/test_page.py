"""What single figures, tables and controls of the page show, in real headless Chromium. Run by `make test-report`."""

from __future__ import annotations

from pathlib import Path

import pytest

from dppo_mcore.practice.ledger import Ledger
from dppo_mcore.report.page import write
from tests.report.driver import walk
from tests.report.synthetic import make_run

pytestmark = pytest.mark.report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run", rollouts=4000, clips=2)


def test_steps_of_a_phase_are_steps_of_the_run(run: Path, node_modules: Path) -> None:
    with Ledger(run / "ledger.sqlite") as ledger:
        known = {phase.name: phase for phase in ledger.phases()}
    [table] = walk(write(run), node_modules, [("table", "Wall time")])
    steps = {row[0]: row[table[0].index("steps")] for row in table[1:]}
    first, second = known["1-1 RL"], known["2-1 RL"]
    assert first.end_step == second.end_step == 12 and second.start_step == 6 + 12 + 6
    assert steps["1-1 RL"] == "6 to 18" and steps["2-1 RL"] == "24 to 36"
    assert steps["1-1 buffer"] == steps["1-2 weakness"] == ""
