"""Putting the report together: one HTML file with styles, scripts, figures' data and blocks inside."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from dppo_mcore.report.blocks import Limits, sample_blocks
from dppo_mcore.report.frames import Seen, frames_of
from dppo_mcore.report.overview import overview
from dppo_mcore.report.packing import Packer, as_json, pack
from dppo_mcore.report.read import ReportError, reading

SCRIPTS = ("svg.js", "charts.js", "tables.js", "panels.js", "store.js", "browser.js", "main.js")
STYLES = ("base.css", "browser.css")
SPARE = 2000
"""Bytes for what the page says about the blocks, and"""
PICTURED = 16
"""for where a sample's pictures are."""


def _asset(name: str) -> str:
    return (files("dppo_mcore.report") / "assets" / name).read_text(encoding="utf-8")


def _inline(value: Any) -> str:
    """JSON that can stand inside a script element: ASCII only, and no tag can begin in it."""
    return as_json(value, ensure_ascii=True).replace("<", "\\u003c")


def _filled(template: str, contents: dict[str, str]) -> str:
    """The template with its {{marks}} filled in one pass, so that contents which look like marks stay as they are."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: contents[found.group(1)], template)


def _digest(script: str) -> str:
    """How the page's policy names the one script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}'"


def _block(name: str, content: str) -> str:
    return f'<script type="text/plain" id="{name}">{content}</script>\n'


def build(folder: Path, limits: Limits = Limits(), version: str = "", seen: Seen | None = None) -> str:  # noqa: B008
    """The page of a run as text; `seen` keeps pictures from one page to the next.

    With a `version`, the run's state from before it is read, the page follows the run: it is loaded anew once the
    server names another. What is written while the page is made is then newer than the page, never missed.
    """
    with reading(folder) as run:
        data = overview(run) | {"live": bool(version), "version": version}
        room = limits.megabytes * 1e6 - len(_page(data, "").encode("utf-8")) - SPARE
        samples = sample_blocks(run, limits, room)
        pictures, note = frames_of(run, samples, limits, seen)
    blocks = [_block("samples-index", pack(samples.index))]
    blocks += [_block(f"samples-{number}", block) for number, block in enumerate(samples.blocks)]
    strips = Packer(room - sum(map(len, blocks)) - PICTURED * len(pictures))
    for place, found in pictures.items():
        strips.add(place, found)
    strips.flush()
    blocks += [_block(f"pictures-{number}", block) for number, block in enumerate(strips.blocks)]
    if len(strips.number) < len(pictures):
        missing = f"{len(pictures) - len(strips.number)} of {len(pictures)} samples"
        note = "; ".join(filter(None, (note, f"without pictures for --max-megabytes: {missing}")))
    data["browser"] = {
        "rolloutsShown": samples.rollouts_shown,
        "rolloutsTotal": samples.rollouts_total,
        "rolloutsOlder": samples.rollouts_older,
        "bare": samples.bare,
        "mostRollouts": limits.rollouts,
        "megabytes": limits.megabytes,
        "pictures": strips.number,
        "note": note,
    }
    return _page(data, "".join(blocks))


def _page(data: dict[str, Any], blocks: str) -> str:
    code = "\n".join(_asset(name) for name in SCRIPTS)
    script = f'\n"use strict";\n(() => {{\nconst DATA = {_inline(data)};\n{code}\n}})();\n'
    return _filled(
        _asset("page.html"),
        {
            "title": html.escape(f"{data['facts']['name']} · training report"),
            "styles": "\n".join(_asset(name) for name in STYLES),
            "script": script,
            "digest": _digest(script),
            "blocks": blocks,
        },
    )


def write(folder: Path, out: Path | None = None, limits: Limits = Limits()) -> Path:  # noqa: B008
    """Write the page to `out` (default RUN/report.html), whole or not at all."""
    out = out or folder / "report.html"
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    page = build(folder, limits)
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(out)
    except OSError as error:
        raise ReportError(f"{out} can't be written ({error.strerror}); --out FILE puts the report elsewhere") from error
    return out
