"""docs/tutorial.md typed as it stands: every bash block, one after the other, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_mcore.data.check import check_manifest
from dppo_mcore.data.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT, LEARNT = ["held_out", "general_held_out"], ["pool", "general", "base"]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_reward_shown_is_the_one_that_is_used() -> None:
    shown = re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown and shown.group(1) in (ROOT / "examples" / "own_rewards.py").read_text()


def test_what_is_held_out_is_asked_nowhere_else_and_the_row_shown_is_the_first(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "examples.own_data", "--out", str(tmp_path)], cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip
    shown = re.search(r"^```json\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown and json.loads(shown.group(1)) == json.loads((tmp_path / "pool.jsonl").read_text().splitlines()[0])
    manifests = {name: read_manifest(str(tmp_path / f"{name}.jsonl")) for name in HELD_OUT + LEARNT}
    for name in LEARNT:
        report = check_manifest(manifests[name], [manifests[other] for other in HELD_OUT], "rows", scored=False)
        assert report.ok() and not report.leaks
    asked = [{sample.turns[0].content for sample in manifests[name]} for name in ("general", "general_held_out")]
    assert not asked[0] & asked[1] and len(asked[0]) == len(asked[1]) == len(manifests["general"]) == 20
    ids = [sample.id for manifest in manifests.values() for sample in manifest]
    assert len(ids) == len(set(ids)) + len(manifests["general"])  # the base learns the general data, by their ids


@pytest.mark.slow
def test_the_tutorial_works_word_for_word(tmp_path: Path) -> None:
    for name in ("examples", "tools", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = "set -e\n" + "".join(BLOCKS)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=1500, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    print(done.stdout[-6000:])
    result = json.loads((tmp_path / "runs" / "own" / "held_out.json").read_text())["summary"]["all"]
    assert result["n"] == 96 and result["success"] > 0.9
    assert (tmp_path / "runs" / "own" / "report.html").stat().st_size > 50_000
    assert (tmp_path / ".cache" / "own" / "trained" / "config.json").exists()
