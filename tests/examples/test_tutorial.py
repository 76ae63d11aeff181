"""docs/tutorial.md typed as it stands: every bash block, one after the other, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_reward_shown_is_the_one_that_is_used() -> None:
    shown = re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown and shown.group(1) in (ROOT / "examples" / "own_rewards.py").read_text()


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
