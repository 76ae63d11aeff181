"""Fixtures of the real SGLang in its own environment: its Python, and a plain HTTP server shared by a session."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.rank_pool import free_port

ROOT = Path(__file__).resolve().parents[2]
SHIMS = ROOT / "tests" / "sglang_shims"
PYTHON = os.environ.get("DPPO_SGLANG_PYTHON", str(ROOT / ".venv-sglang" / "bin" / "python"))


def shim_path() -> str:
    """PYTHONPATH under which SGLang's environment imports without CUDA."""
    return os.pathsep.join(dict.fromkeys([str(SHIMS), *filter(None, [os.environ.get("PYTHONPATH")])]))


@dataclass
class HttpServer:
    """A running `sglang.launch_server`."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


def _die_with_parent() -> None:
    """A server must not outlive a test run that is killed (prctl 1 is PR_SET_PDEATHSIG); its workers follow it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def launch(model: str, log: Path, *extra: str, dtype: str = "float32", timeout_s: float = 240.0) -> HttpServer:
    """Start a server on loopback and wait until it is ready; its process group is its own."""
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": str(SHIMS),
        "OMP_NUM_THREADS": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    for name in ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [PYTHON, "-m", "sglang.launch_server", "--model-path", model, "--device", "cpu", "--dtype", dtype]
    command += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--mem-fraction-static", "0.1", "--max-total-tokens", "4096"]
    command += ["--max-running-requests", "8", "--disable-overlap-schedule", "--disable-cuda-graph"]
    command += ["--skip-server-warmup", "--sleep-on-idle", "--chat-template", "qwen2-vl", *extra]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
    server = HttpServer(process, f"http://127.0.0.1:{port}", log)
    deadline = time.monotonic() + timeout_s
    while not server.alive:
        if process.poll() is not None or time.monotonic() > deadline:
            stop(server)
            raise AssertionError(
                f"SGLang did not come up; the end of {log}:\n{log.read_text(errors='replace')[-2000:]}"
            )
        time.sleep(0.5)
    return server


def stop(server: HttpServer) -> None:
    """End a server with its workers."""
    try:
        os.killpg(server.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    server.process.wait()


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """Python of SGLang's environment."""
    if not Path(PYTHON).exists():
        pytest.fail(f"{PYTHON} is missing; `make setup-sglang` makes it")
    return PYTHON


@pytest.fixture
def sglang_environment(monkeypatch: pytest.MonkeyPatch, sglang_python: str) -> str:
    """The same, and an environment in which this process starts sidecars without CUDA."""
    monkeypatch.setenv("PYTHONPATH", shim_path())
    return sglang_python


@pytest.fixture(scope="session")
def sglang_server(sglang_python: str, tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    """A plain HTTP server over the tiny checkpoint, fp32, one for the session."""
    server = launch(tiny_dir, tmp_path_factory.mktemp("sglang") / "server.log")
    yield server
    stop(server)
