"""A sidecar that hangs or ends at a bad moment never makes the trainer wait for ever. Without an engine."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from dppo_mcore.rollout import sidecar_client
from dppo_mcore.rollout.base import EngineError
from dppo_mcore.rollout.sidecar_client import EngineDied, SidecarClient

GREETING = "connection.sendall(wire.encode({'id': -1, 'ok': {}}))"


def client(folder: Path, behaviour: str) -> SidecarClient:
    """A client whose sidecar connects and then does `behaviour`."""
    script = folder / "sidecar.py"
    script.write_text(
        "import socket, sys, time\nfrom dppo_mcore.rollout import wire\n"
        "connection = socket.socket(socket.AF_UNIX)\n"
        f"connection.connect(sys.argv[sys.argv.index('--socket') + 1])\n{behaviour}\n"
    )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    return SidecarClient(str(python), {}, folder / "log", start_timeout_s=60.0)


def test_one_that_takes_nothing_any_more_is_lost_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket full, `submit` returns, every answer owed fails, and closing doesn't wait."""
    monkeypatch.setattr(sidecar_client, "SEND_TIMEOUT_S", 1)
    made = client(tmp_path, f"{GREETING}\ntime.sleep(600)")
    try:
        small = made.submit("ping")
        began = time.monotonic()
        large = made.submit("generate", input_ids=list(range(200_000)))
        for future in (small, large):
            with pytest.raises(EngineDied, match="engine is gone"):
                future.result(10)
        assert time.monotonic() - began < 20
        with pytest.raises(EngineDied):
            made.call("ping", timeout_s=5.0)
    finally:
        made.close()
        made.close()


def test_one_that_ends_before_it_greets_is_an_error(tmp_path: Path) -> None:
    """As any other that doesn't start."""
    with pytest.raises(EngineError, match="ended while it started"):
        client(tmp_path, "connection.close()")


def test_one_that_sends_nonsense_is_lost(tmp_path: Path) -> None:
    """Whatever the reader meets, nobody waits for an answer that can't come."""
    made = client(tmp_path, f"{GREETING}\nconnection.sendall(wire.encode({{'no': 'id'}}))\ntime.sleep(600)")
    try:
        with pytest.raises(EngineDied):
            made.call("ping", timeout_s=30.0)
        assert not made.alive
    finally:
        made.close()
