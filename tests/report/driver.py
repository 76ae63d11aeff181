"""Headless Chromium for the report's tests: what it needs, and how a page is worked through step by step."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOOLS = ROOT / ".cache" / "report-check"


def chromium() -> str:
    """Path of the browser; its absence is a failure, not a skip."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "chromium is missing: apt-get install chromium"
    return found


def install() -> Path:
    """The driver and the accessibility checker, installed once."""
    assert shutil.which("npm"), "npm is missing: apt-get install nodejs npm"
    TOOLS.mkdir(parents=True, exist_ok=True)
    wanted = (HERE / "package.json").read_text()
    stamp = TOOLS / "installed.json"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.copy(HERE / "package.json", TOOLS / "package.json")
        subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=TOOLS, check=True, capture_output=True)
        stamp.write_text(wanted)
    return TOOLS


def walk(report: Path, node_modules: Path, steps: Sequence[tuple[str, ...]]) -> list[Any]:
    """What the steps of `steps.mjs` give on a report; the page must not complain meanwhile."""
    command = ["node", str(HERE / "steps.mjs"), str(report), str(node_modules), chromium(), json.dumps(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["errors"] == [], result["errors"]
    found: list[Any] = result["found"]
    return found
