"""The trainer's side of the sidecar: starts the process, talks to it, and knows when it is gone."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from dppo_mcore.rollout import wire
from dppo_mcore.rollout.base import EngineError

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
CONTROL_S = 60.0
"""Pausing, going on, aborting and flushing take a moment; an engine that needs longer hangs."""
SEND_TIMEOUT_S = 60
"""A living sidecar reads at once; one that takes nothing for so long hangs."""


class EngineDied(ConnectionError):  # noqa: N818 - an event to recover from, not a mistake
    """The engine's process ended or closed its connection."""


class Refused(ValueError):  # noqa: N818 - the engine's answer, not ours
    """The engine is well and refused the request."""


class SidecarClient:
    """One running sidecar. `call` and `submit` may be used from any thread."""

    def __init__(
        self,
        python: str,
        options: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 900.0,
    ) -> None:
        self._numbers = itertools.count()
        self._futures: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self.log = log
        self._folder = Path(tempfile.mkdtemp(prefix="dppo-engine-"))
        address = str(self._folder / "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(address)
            listener.listen(1)
            self._process = self._spawn(python, address, options, environment or {})
            self._connection = self._accept(listener, start_timeout_s)
        except BaseException:
            self.close()
            raise
        finally:
            listener.close()
        self._reader = threading.Thread(target=self._read, name="engine-replies", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the sidecar, and of its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs and is connected."""
        return not self._closed.is_set() and self._process.poll() is None

    def submit(self, op: str, **arguments: Any) -> Future[Any]:
        """Send a request; the future holds its answer, `Refused`, or `EngineDied`."""
        future: Future[Any] = Future()
        number = next(self._numbers)
        message = wire.encode({"id": number, "op": op, "args": arguments})
        with self._lock:
            if self._closed.is_set():
                future.set_exception(EngineDied(f"the engine is gone; its log is {self.log}"))
                return future
            self._futures[number] = future
        try:
            with self._sending:
                self._connection.sendall(message)
        except OSError:
            # Part of a message may be out, so the connection is of no use; the reader then fails what is open.
            self._hang_up()
        return future

    def call(self, op: str, timeout_s: float = 600.0, **arguments: Any) -> Any:
        """Send a request and wait for its answer; `EngineDied` when there is none in time."""
        try:
            return self.submit(op, **arguments).result(timeout_s)
        except TimeoutError:
            raise EngineDied(f"the engine did not answer {op!r} within {timeout_s:.0f} s") from None

    def close(self) -> None:
        """End the sidecar with everything it started; harmless twice."""
        process = getattr(self, "_process", None)
        connection = getattr(self, "_connection", None)
        if connection is not None:
            self._hang_up()
        if process is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                pass  # killed, but held up in the kernel
        if connection is not None:
            self._reader.join(timeout=10)
            connection.close()
        self._fail_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _hang_up(self) -> None:
        """End the connection; wakes whoever reads from it or writes to it."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _spawn(
        self, python: str, address: str, options: Mapping[str, Any], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        paths = [str(PACKAGE_ROOT), *filter(None, [environment.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))])]
        child_environment = {
            **_without_torchrun(os.environ),
            **environment,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as output:
            process = subprocess.Popen(
                [python or sys.executable, "-m", "dppo_mcore.rollout.sidecar"]
                + ["--socket", address, "--parent", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment,
                cwd=self._folder,
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(options).encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended at once; `_accept` says so
        return process

    def _accept(self, listener: socket.socket, timeout_s: float) -> socket.socket:
        deadline = time.monotonic() + timeout_s
        listener.settimeout(0.5)
        while True:
            try:
                connection, _ = listener.accept()
                return self._greet(connection)
            except TimeoutError:
                if self._process.poll() is not None:
                    raise EngineError(
                        f"the engine did not start (exit code {self._process.returncode}): {self.last_words()}; "
                        f"its log is {self.log}"
                    ) from None
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"the engine was not up within {timeout_s:.0f} s; its log is {self.log}"
                    ) from None

    def _greet(self, connection: socket.socket) -> socket.socket:
        """Take the sidecar's first message, and let no later one of ours block for ever."""
        connection.settimeout(SEND_TIMEOUT_S)
        try:
            wire.receive(connection)
        except OSError as error:
            connection.close()
            raise EngineError(f"the engine ended while it started ({error}); its log is {self.log}") from None
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
        return connection

    def last_words(self) -> str:
        """Last line of the engine's log that isn't empty."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, self.log.stat().st_size - 8192))
                lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        return lines[-1] if lines else "no output"

    def _read(self) -> None:
        try:
            while True:
                message = wire.receive(self._connection)
                with self._lock:
                    future = self._futures.pop(message["id"], None)
                if future is None:
                    continue
                if "ok" in message:
                    future.set_result(message["ok"])
                elif message["kind"] == "refused":
                    future.set_exception(Refused(message["error"]))
                else:
                    future.set_exception(RuntimeError(message["error"]))
        except (OSError, ValueError):
            pass
        finally:
            self._fail_all()

    def _fail_all(self) -> None:
        with self._lock:
            self._closed.set()
            futures, self._futures = self._futures, {}
        for future in futures.values():
            future.set_exception(EngineDied(f"the engine is gone; its log is {self.log}"))


def _without_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment less what would draw the engine's workers into the trainer's own process group."""
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"}
    names |= {"MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET", "TORCHDYNAMO_DISABLE"}
    return {key: value for key, value in environment.items() if key not in names and not key.startswith("TORCHELASTIC")}
