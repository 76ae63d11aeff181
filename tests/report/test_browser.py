"""The report in real headless Chromium: clicks, times, console, accessibility. Run by `make test-report`."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dppo_mcore.practice.ledger import Ledger
from dppo_mcore.report import watch
from dppo_mcore.report.blocks import Limits
from dppo_mcore.report.page import build, write
from dppo_mcore.report.watch import REBUILD_SECONDS, make_server
from tests.report.driver import HERE, ROOT, TOOLS, chromium
from tests.report.synthetic import make_run

FIRST_PAINT_MS = 2000
FILTER_MS = 300
MOST_BYTES = 150e6

pytestmark = pytest.mark.report


def check(report: Path, node_modules: Path, shots: Path) -> dict[str, Any]:
    """Work through a report; screenshots are kept in `shots`."""
    shots.mkdir(parents=True, exist_ok=True)
    command = ["node", str(HERE / "browser_check.mjs"), str(report), str(node_modules), chromium(), str(shots)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps({key: result[key] for key in ("firstPaint", "ready", "filters", "checks")}, indent=1))
    return result


def judge(result: dict[str, Any]) -> None:
    """What holds for every report."""
    assert result["errors"] == [] and result["requests"] == []
    assert result["firstPaint"] < FIRST_PAINT_MS
    assert max(result["filters"].values()) < FILTER_MS, result["filters"]
    checks = result["checks"]
    assert checks["all"] > checks["objective"] > 0 and checks["all"] > checks["text"] > 0
    assert checks["secondPage"] and checks["keyboard"] and checks["answers"] > 0 and checks["numbers"] > 0
    assert (
        checks["pictures"] >= 8
        and max(checks["overflow"], checks["overflowNarrow"]) <= 0
        and checks["pwned"] == "undefined"
    )
    for theme in ("light", "dark"):
        serious = [found for found in result[theme] if found["impact"] in ("serious", "critical")]
        assert not serious, f"{theme}: {json.dumps(serious, indent=1)}"


def test_a_report_of_100k_rollouts(tmp_path: Path, node_modules: Path) -> None:
    run = make_run(tmp_path / "run", rollouts=100_000, clips=40)
    report = write(run)
    assert report.stat().st_size <= MOST_BYTES
    print(f"{report.stat().st_size / 1e6:.1f} MB")
    result = check(report, node_modules, TOOLS / "shots-100k")
    judge(result)
    checks = result["checks"]
    assert result["lead"] == "Made up & <b>counted</b>."
    assert checks["taught"] > 0 and checks["unsolved"] > 0
    assert checks["hostile"] == 1 and checks["hostileText"] and checks["inserted"] == 0


def test_the_report_of_a_demo_run(node_modules: Path) -> None:
    """RUN of the environment, by default the demo's, which `make demo` makes first."""
    run = Path(os.environ.get("RUN", ROOT / "runs" / "demo"))
    assert (run / "ledger.sqlite").exists(), f"no run at {run}: make demo first, or set RUN"
    result = check(write(run, run / "report.html"), node_modules, TOOLS / "shots-demo")
    judge(result)
    assert "inconsistent on purpose" in result["lead"]


def test_a_followed_run_keeps_the_readers_place(
    tmp_path: Path, node_modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_build(*arguments: Any) -> str:
        """A large run's page takes longer than a reader waits between two looks."""
        time.sleep(4)
        return build(*arguments)

    monkeypatch.setattr(watch, "build", slow_build)
    monkeypatch.setattr(watch, "SHARE_OF_TIME", 10)
    run = make_run(tmp_path / "a-run-with-a-name-of-its-own-that-is-long", rollouts=4000, clips=4)
    server = make_server(run, 0, Limits(frame_samples=4))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shots = TOOLS / "shots-followed"
    shots.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    command = ["node", str(HERE / "watch_check.mjs"), address, str(node_modules), chromium(), str(shots)]
    written = 0
    # The reader gets a page that was made a while ago, so that whatever comes now is seen by its first look at the run.
    urllib.request.urlopen(address, timeout=30).read()
    time.sleep(REBUILD_SECONDS + 0.5)
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as browser:
            assert browser.stdin and browser.stdout
            while (line := browser.stdout.readline()) == "write\n":
                with Ledger(run / "ledger.sqlite") as ledger:
                    ledger.quarantine(f"late-{written}.mp4", "rl-hostile", "written while someone was reading")
                written += 1
                browser.stdin.write("written\n")
                browser.stdin.flush()
            result = json.loads(line)
    finally:
        server.shutdown()
        server.server_close()
    assert result["errors"] == [] and written == 2 and result["loads"] == 3
    assert result["held"] == {"list": True, "detail": True, "details": True}
    assert result["said"] == ["newer data"] and result["overflow"] <= 0
    assert result["after"] == result["before"] and "page 2" in result["before"]["found"]
    assert result["focus"] == result["before"]["current"] and result["focusAfter"] is None
    assert result["live"] == "live" and not result["newer"]
