"""The container image: pinned, without root, checked by doctor, a small context; the image's own packages stay."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import image_pins
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONTEXT_MIB = 4


def lines(instruction: str) -> list[str]:
    """Arguments of an instruction of the Dockerfile, in order."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{instruction} ")]


def test_the_image_is_pinned_and_runs_without_root() -> None:
    (base,) = (line.removeprefix("BASE=") for line in lines("ARG"))
    assert base.startswith("nvcr.io/nvidia/pytorch:") and base.endswith("-py3")
    assert lines("FROM") == ["${BASE}"]
    assert lines("USER")[-1] not in ("root", "0")
    assert "dppo_mcore.doctor" in lines("HEALTHCHECK")[-1]


def test_the_command_shown_mounts_what_its_configuration_names_and_keeps_the_run() -> None:
    shown = (ROOT / "Dockerfile").read_text().split("\nARG ")[0]
    mounts = dict(re.findall(r"-v (\S+):(\S+)", shown))
    (volume,) = lines("VOLUME")
    (config,), (folder,) = (re.findall(rf"--{name} (\S+)", shown) for name in ("config", "run-folder"))
    named = yaml.safe_load((ROOT / config).read_text())
    files = [named["run"]["model"], *(path for name, path in named["data"].items() if name.endswith("data"))]
    assert volume in mounts.values() and folder.startswith(f"{volume}/")
    assert len(files) == 5 and all(any(path.startswith(f"{inside}/") for inside in mounts.values()) for path in files)


def test_everything_copied_is_in_a_small_context() -> None:
    rules = (ROOT / ".dockerignore").read_text().split()
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {name.rstrip("/") for line in lines("COPY") for name in line.split()[:-1]}
    assert rules[0] == "*" and copied == allowed
    tracked = subprocess.run(["git", "ls-files", *allowed], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sum((ROOT / name).stat().st_size for name in tracked.stdout.split("\n") if name) < CONTEXT_MIB * 2**20


def test_a_development_build_from_a_file_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip freeze` shows such a package by its file, which is no constraint: pip would replace it."""
    folder = tmp_path / "torch-2.11.0a0+abc.nv26.3.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0a0+abc.nv26.3\n")
    (folder / "direct_url.json").write_text('{"url": "file:///wheels/torch.whl", "archive_info": {}}')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "torch==2.11.0a0+abc.nv26.3" in image_pins.pins()
