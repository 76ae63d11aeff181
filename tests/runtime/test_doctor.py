"""Doctor's word on SGLang: its engine is imported where a run would look for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dppo_mcore import doctor
from tests.support.sglang_server import PYTHON, SHIMS

ROOT = Path(__file__).resolve().parents[2]


def test_a_python_without_sglang_and_none_at_all_are_told_apart() -> None:
    assert doctor.sglang(sys.executable).detail == f"none in {sys.executable}"
    found = doctor.sglang("/nowhere/bin/python")
    assert (found.state, found.detail) == ("missing", "no /nowhere/bin/python")


def test_the_remedy_is_what_the_image_does() -> None:
    requirement = doctor.sglang("/nowhere/bin/python").remedy.split('"')[1]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert requirement.startswith("sglang") and f'"{requirement}"' in dockerfile
    assert any(f"{python} -m pip install" in dockerfile for python in doctor.SGLANG_PYTHONS)


@pytest.mark.sglang
def test_an_engine_that_does_not_import_is_broken_whatever_its_metadata_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = doctor.sglang(PYTHON)
    assert found.state == "broken" and "does not import" in found.detail and found.remedy
    monkeypatch.setenv("PYTHONPATH", str(SHIMS))
    monkeypatch.setattr(doctor, "SGLANG_PYTHONS", (sys.executable, "/nowhere/bin/python", PYTHON))
    found = doctor.sglang()
    assert found.state == "ok" and found.detail.endswith(f"in {PYTHON}")


@pytest.mark.sglang
def test_an_import_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SGLANG_IMPORT_S", 0.01)
    found = doctor.sglang(PYTHON)
    assert found.state == "broken" and "not imported within 0.01 s" in found.detail
