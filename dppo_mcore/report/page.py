"""Putting the report together: one HTML file with styles, scripts, figures' data and blocks inside."""

from __future__ import annotations

import html
import json
import os
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from dppo_mcore.report.blocks import Limits, pack, sample_blocks
from dppo_mcore.report.frames import frames_of
from dppo_mcore.report.overview import overview
from dppo_mcore.report.read import open_run

SCRIPTS = ("svg.js", "charts.js", "tables.js", "panels.js", "store.js", "browser.js", "main.js")
STYLES = ("base.css", "browser.css")
FRAMES_PER_BLOCK = 50


def _asset(name: str) -> str:
    return (files("dppo_mcore.report") / "assets" / name).read_text(encoding="utf-8")


def _inline(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _block(name: str, content: str) -> str:
    return f'<script type="text/plain" id="{name}">{content}</script>\n'


def build(folder: Path, limits: Limits = Limits(), live: bool = False) -> str:  # noqa: B008
    """The page of a run as text."""
    run = open_run(folder)
    try:
        data = overview(run)
        samples = sample_blocks(run, limits)
        pictures, note = frames_of(run, samples, limits)
    finally:
        run.close()
    places = sorted(pictures)
    groups = [places[k : k + FRAMES_PER_BLOCK] for k in range(0, len(places), FRAMES_PER_BLOCK)]
    data["browser"] = {
        "rolloutsShown": samples.rollouts_shown,
        "rolloutsTotal": samples.rollouts_total,
        "blocks": len(samples.blocks),
        "pictures": {place: number for number, group in enumerate(groups) for place in group},
        "note": note,
    }
    data["live"] = live
    data["made"] = time.time()
    parts = [_block("samples-index", pack(samples.index))]
    parts += [_block(f"samples-{number}", block) for number, block in enumerate(samples.blocks)]
    parts += [_block(f"pictures-{number}", pack({place: pictures[place] for place in group}))
              for number, group in enumerate(groups)]  # fmt: skip
    scripts = "\n".join(_asset(name) for name in SCRIPTS)
    page = _asset("page.html")
    for mark, content in (
        ("{{title}}", html.escape(f"{data['facts']['name']} · training report")),
        ("{{styles}}", "\n".join(_asset(name) for name in STYLES)),
        ("{{overview}}", _inline(data)),
        ("{{scripts}}", scripts),
        ("{{blocks}}", "".join(parts)),
    ):
        page = page.replace(mark, content, 1)
    return page


def write(folder: Path, out: Path | None = None, limits: Limits = Limits()) -> Path:  # noqa: B008
    """Write the page to `out` (default RUN/report.html), whole or not at all."""
    out = out or folder / "report.html"
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.write_text(build(folder, limits), encoding="utf-8")
    unfinished.replace(out)
    return out
