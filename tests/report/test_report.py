"""The report's Python side: what is read, counted, bounded and written."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dppo_mcore.practice.ledger import Ledger
from dppo_mcore.report import frames
from dppo_mcore.report import page as page_module
from dppo_mcore.report.__main__ import main
from dppo_mcore.report.blocks import Limits, sample_blocks
from dppo_mcore.report.frames import Seen
from dppo_mcore.report.overview import overview, rate_class
from dppo_mcore.report.page import build
from dppo_mcore.report.read import Run, open_run, read_metrics, state_token, text_of
from dppo_mcore.report.statistics import thin, wilson
from dppo_mcore.report.watch import LiveReport, make_server
from dppo_mcore.types import Sample, Turn
from tests.report.synthetic import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run", rollouts=1200, clips=6)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return build(run, Limits(frame_samples=20))


def unpack(page: str, name: str) -> object:
    found = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', page)
    assert found, name
    return json.loads(gzip.decompress(base64.b64decode(found.group(1))))


def test_wilson_interval_of_a_worked_example() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 0) == (0.0, 1.0)


def test_thinned_series_keeps_means_and_its_end() -> None:
    points = [(float(k), float(k)) for k in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100 and thinned[-1][0] == 999
    assert sum(y for _, y in thinned) / 100 == pytest.approx(499.5)


@pytest.mark.parametrize(
    ("successes", "trials", "expected"), [(0, 8, 0), (1, 8, 1), (2, 8, 1), (3, 8, 2), (6, 8, 3), (7, 8, 4), (8, 8, 5)]
)
def test_classes_of_success_rates(successes: int, trials: int, expected: int) -> None:
    assert rate_class(successes, trials) == expected


def test_overview_agrees_with_the_ledger(run: Path) -> None:
    opened = open_run(run)
    data = overview(opened)
    rollouts = opened.rows("SELECT count(*) FROM rollouts")[0][0]
    assert data["facts"]["note"] == "Made up & <b>counted</b>."
    assert data["facts"]["rollouts"] == rollouts == sum(p["rollouts"] for p in data["phases"])
    last = [entry for entry in data["evaluations"] if entry["name"] == "eval"][-1]
    query = ("SELECT sum(success), count(*) FROM evaluation_answers WHERE name = 'eval' AND phase = "
             "(SELECT max(phase) FROM evaluation_answers)")  # fmt: skip
    successes, count = opened.rows(query)[0]
    assert (last["all"]["n"], last["all"]["p"]) == (count, successes / count)
    assert sum(share["n"] for share in last["objective"].values()) == count
    assert len(last["dimension"]) == 9
    for phase in data["success"]:
        assert sum(sum(counts) for _, counts in phase["steps"]) == phase["groups"]
    steps = [row for row in read_metrics(run) if "rl/success" in row]
    spent = data["curves"]["flops"]
    assert sum(stages["training"] for stages in spent.values()) == 3e12 * len(steps)
    assert sum(stages["generation"] for stages in spent.values()) == 2e12 * len(steps)
    assert data["corpus"]["items"] and data["corpus"]["teacher"] and data["corpus"]["buffers"]
    opened.close()


def test_every_rollout_is_in_its_block(run: Path, page: str) -> None:
    index = unpack(page, "samples-index")
    assert isinstance(index, dict)
    seen = 0
    for number in range(max(index["block"]) + 1):
        block = unpack(page, f"samples-{number}")
        assert isinstance(block, dict)
        for place, sample in block.items():
            assert index["block"][int(place)] == number
            assert len(sample["rollouts"]) == index["rollouts"][int(place)]
            seen += len(sample["rollouts"])
    opened = open_run(run)
    assert seen == opened.rows("SELECT count(*) FROM rollouts")[0][0]
    opened.close()


def test_pictures_are_there_for_the_chosen_samples(page: str) -> None:
    pictures = unpack(page, "pictures-0")
    assert isinstance(pictures, dict) and len(pictures) <= 20
    strips = [strip for strips in pictures.values() for strip in strips if strip]
    assert strips and all(len(strip) == 8 for strip in strips)
    assert base64.b64decode(strips[0][0][1])[:2] == b"\xff\xd8"


def test_a_ledger_its_run_keeps_to_itself_is_read_from_the_copy(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rollouts=200, clips=1)
    whole = len(build(folder, Limits(frame_samples=0)))
    with Ledger(folder / "ledger.sqlite", file_system="lustre") as ledger:
        ledger.decide("1-1 RL", 1, "stagnation", {}, "so that the file is locked")
        (folder / "ledger.copy.sqlite").unlink(missing_ok=True)
        ledger.publish()
        opened = open_run(folder)
        facts = overview(opened)["facts"]
        opened.close()
        assert opened.as_of_copy and facts["rollouts"] > 0 and facts["note"].endswith("last finished phase.")
        page = build(folder, Limits(frame_samples=0))
    assert len(page) > 0.9 * whole
    assert not open_run(folder).as_of_copy


def test_the_page_asks_for_nothing_outside_itself(page: str) -> None:
    outside = re.sub(r'<script type="text/plain"[^<]*</script>', "", page)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", outside)
    assert "default-src 'none'" in outside and "@import" not in outside


def test_text_from_the_model_cannot_leave_its_script(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rollouts=200, clips=1)
    (folder / "config.yaml").write_text("run: '</script><script>alert(1)</script>'")
    page = build(folder, Limits(frame_samples=0))
    assert "alert(1)</script>" not in page


def test_only_the_script_written_here_may_run(page: str) -> None:
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script and page.count("<script>") == 1
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "script-src 'unsafe-inline'" not in page


def test_contents_that_look_like_marks_or_are_no_text_stay_as_they_are(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rollouts=200, clips=1)
    (folder / "config.yaml").write_text("run: '{{styles}} {{blocks}} {{script}}'")
    (folder / "metrics.jsonl").open("a").write('{"step": 99, "phase": "\\ud800", "rl/reward": 0.5}\n')
    page = build(folder, Limits(frame_samples=0))
    assert "{{styles}} {{blocks}} {{script}}" in page and page.count('id="samples-index"') == 1
    page.encode("utf-8")


def test_a_collapsed_run_still_has_curves(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rollouts=200, clips=1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "phase": "2-1 RL", "rl/loss": NaN, "rl/reward": Infinity, "rl/entropy": 0.25}\n')
    opened = open_run(folder)
    series = overview(opened)["curves"]["series"]
    opened.close()
    assert all(math.isfinite(value) for points in series.values() for _, value in points)
    assert series["rl/entropy"][-1] == (99, 0.25)


def test_one_page_shows_one_moment_of_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rollouts=200, clips=1)
    opened = open_run(folder)
    before = opened.rows("SELECT count(*) FROM samples")
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.add_samples([Sample("late", "exact", (Turn("user", "late ?"),))], "rl")
    assert opened.rows("SELECT count(*) FROM samples") == before
    opened.close()


def test_bounds_on_rollouts_and_size_are_kept_and_told(run: Path) -> None:
    opened = open_run(run)
    newest = sample_blocks(opened, Limits(rollouts=200))
    assert newest.rollouts_shown == 200 < newest.rollouts_total
    small = sample_blocks(opened, Limits(megabytes=1e-6))
    assert small.index["block"].count(-1) > 0 and small.rollouts_shown < small.rollouts_total
    opened.close()


def test_a_cut_off_metrics_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rl/reward": 0.5}\n{"step": 2, "rl/rew')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_stored_text_comes_back() -> None:
    import zlib

    assert text_of("short") == "short"
    assert text_of(zlib.compress("länger".encode())) == "länger"


def test_a_folder_without_a_ledger_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ledger.sqlite" in error and "--run" in error


def test_an_empty_run_makes_a_page(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_page_made_anew_reuses_the_pictures(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Seen = {}
    first = unpack(build(run, Limits(frame_samples=3), seen=seen), "pictures-0")
    monkeypatch.setattr(frames, "_pictures", lambda medium: pytest.fail("decoded again"))
    assert unpack(build(run, Limits(frame_samples=3), seen=seen), "pictures-0") == first


def test_watching_serves_on_loopback_and_follows_the_run(run: Path) -> None:
    server = make_server(run, 0, Limits(frame_samples=0))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert server.server_address[0] == "127.0.0.1"
        body = urllib.request.urlopen(f"{address}/", timeout=30).read().decode()
        assert f'"live":true,"version":"{state_token(run)}"' in body
        assert urllib.request.urlopen(f"{address}/version", timeout=30).read().decode() == state_token(run)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/ledger.sqlite", timeout=30)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(f"{address}/", headers={"Host": "evil.example"}), timeout=30)
    finally:
        server.shutdown()
        server.server_close()


def test_what_is_written_while_a_page_is_made_is_newer_than_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", rollouts=200, clips=1)
    before = state_token(folder)

    def overtaken(run: Run) -> dict[str, Any]:
        found = overview(run)
        with Ledger(folder / "ledger.sqlite") as ledger:
            ledger.quarantine("late.mp4", "rl-hostile", "written while the page was made")
        return found

    monkeypatch.setattr(page_module, "overview", overtaken)
    made = LiveReport(folder, Limits(frame_samples=0)).page().decode()
    assert f'"version":"{before}"' in made and state_token(folder) != before


def test_a_followed_page_waits_for_the_next_to_be_made(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rollouts=200, clips=1)
    server = make_server(folder, 0, Limits(frame_samples=0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert urllib.request.urlopen(f"{address}/made", timeout=30).read() == b""
        (folder / "ledger.sqlite").write_bytes(b"no ledger " * 1000)
        assert len(urllib.request.urlopen(f"{address}/", timeout=30).read()) > 10_000
    finally:
        server.shutdown()
        server.server_close()


def test_a_followed_run_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no ledger " * 1000)
    server = make_server(tmp_path, 0, Limits(frame_samples=0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(urllib.error.HTTPError, match="503") as raised:
            urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}/", timeout=30)
        assert "it is damaged, or no ledger" in raised.value.read().decode()
    finally:
        server.shutdown()
        server.server_close()
