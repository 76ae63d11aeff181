"""Living gloo ranks that take functions: a launch costs seconds, a call milliseconds."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class RankError(AssertionError):
    """A function failed on a rank; carries that rank's traceback."""


def free_port() -> int:
    """A loopback port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, world: int, port: int, connection: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    import torch

    torch.set_num_threads(1)
    from dppo_mcore.config import ParallelConfig
    from dppo_mcore.runtime import parallel

    parallel.start(ParallelConfig(distributed_timeout_minutes=2), seed=0)
    connection.send(("ready", None))
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            parallel.stop()
            return
        function, args, kwargs = request
        try:
            answer = ("result", function(*args, **kwargs))
        except BaseException:
            answer = ("error", traceback.format_exc())
        gc.collect()  # groups that only garbage still holds keep threads, which poll
        connection.send(answer)


class RankPool:
    """`world` processes in one gloo group; `run` calls a module-level function on all of them."""

    def __init__(self, world: int, start_timeout_s: float = 300.0) -> None:
        self.world = world
        self._start_timeout_s = start_timeout_s
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0, **kwargs: Any) -> list[Any]:
        """Results by rank. A failing rank's traceback is raised, and the pool starts afresh for the next call."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args, kwargs))
        try:
            return self._collect("result", timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        paths = [str(ROOT), str(ROOT / "kernels")]
        os.environ["PYTHONPATH"] = os.pathsep.join(
            dict.fromkeys([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
        )
        port = free_port()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect("ready", self._start_timeout_s)

    def _show_stacks(self, ranks: set[int]) -> None:
        """Have these ranks write what they are doing to stderr."""
        for rank in ranks:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(1.0)

    def _collect(self, expected: str, timeout_s: float) -> list[Any]:
        """Waits for every rank, but only a moment for the others once one has failed."""
        answers: dict[int, Any] = {}
        errors: list[str] = []
        deadline = time.monotonic() + timeout_s
        open_ranks = set(range(self.world))
        while open_ranks:
            left = deadline - time.monotonic()
            ready = wait([self._connections[rank] for rank in open_ranks], timeout=max(0.0, left))
            if not ready:
                if errors:
                    break
                self._show_stacks(open_ranks)
                raise RankError(f"ranks {sorted(open_ranks)} did not answer within {timeout_s:.0f} s")
            for rank in [rank for rank in open_ranks if self._connections[rank] in ready]:
                open_ranks.discard(rank)
                try:
                    kind, value = self._connections[rank].recv()
                except EOFError:
                    kind, value = "error", f"rank process ended with exit code {self._processes[rank].exitcode}"
                if kind == expected:
                    answers[rank] = value
                else:
                    errors.append(f"rank {rank}:\n{value}")
                    deadline = min(deadline, time.monotonic() + 3.0)
        if errors:
            raise RankError("\n".join(errors))
        return [answers[rank] for rank in range(self.world)]
