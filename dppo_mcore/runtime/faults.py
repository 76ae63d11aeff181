"""How a run ends: one failing rank ends all within seconds, its traceback shown once; SIGTERM ends it cleanly.

A failing rank writes to the job's store before it exits. A thread on every rank watches that key and the SIGTERM
wake-up pipe, because a main thread that waits inside a collective runs no Python signal handler.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from dppo_mcore.runtime.errors import SAYING_S, UserError

FAILURE_KEY = "dppo_mcore/failure/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
"""torchrun's store outlives its restarts, a failure does not."""
POLL_S = 0.5
INTERRUPT_S = 5.0
"""After Ctrl-C a main thread that waits inside a collective is left this long to come out of it."""
FULL_DISK = ("No space left on device", "database or disk is full")
"""How libraries that raise errors of their own (safetensors, SQLite) name a full disk."""
RESUME_HINT = "stopped by SIGTERM; resume with the same command"

_terminate = threading.Event()
_store: object | None = None


class Preempted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop and has saved; it ends with exit code 0."""


def run_guarded(main: Callable[[], None]) -> NoReturn:
    """Call `main` and leave the process with the right code: 0, 1 (this or another rank failed), 2, 130."""
    try:
        main()
    except Preempted:
        _say(RESUME_HINT)
        _leave(0)
    except KeyboardInterrupt:
        if _announce_failure():
            _say("interrupted")
        _leave(130)
    except SystemExit as ending:
        _leave(ending.code if isinstance(ending.code, int) else int(ending.code is not None))
    except BaseException as error:
        line = _known_error(error)
        report = f"error: {line}" if line else _traceback()
        if logging.getLogger().handlers:
            logging.getLogger().error(report)  # to this rank's own file, whoever failed first
        if _announce_failure():
            _say(report)
        _leave(1)
    _leave(0)


def watch() -> None:
    """Start watching for other ranks' failures and for SIGTERM; called once the process group is up."""
    global _store
    from torch.distributed import TCPStore

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_PORT" in os.environ and _store is None:
        _store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        threading.Thread(target=_watch_store, name="failure-watch", daemon=True).start()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: _terminate.set())
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch_signals, args=(reader, writer), name="signal-watch", daemon=True).start()


def terminating() -> bool:
    """Whether this rank was told to stop; for one that acts alone. Others learn of it by `stop_requested`."""
    return _terminate.is_set()


def stop_requested() -> bool:
    """Whether any rank was told to stop; collective, so that all ranks agree at the same step."""
    import torch
    import torch.distributed as dist

    from dppo_mcore.runtime import device

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _terminate.is_set()
    flag = torch.tensor([int(_terminate.is_set())], device=device.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _watch_store() -> None:
    while True:
        time.sleep(POLL_S)
        try:
            if _store.check([FAILURE_KEY]):  # type: ignore[union-attr]
                os._exit(1)
        except Exception:
            return  # the store is gone with the job


def _watch_signals(reader: socket.socket, writer: socket.socket) -> None:
    while received := reader.recv(1):
        if received[0] == signal.SIGTERM:
            _terminate.set()
        if received[0] == signal.SIGINT:
            time.sleep(INTERRUPT_S)
            if _announce_failure():
                _say("interrupted")
            os._exit(130)
    writer.close()


def _announce_failure() -> bool:
    """True for the first rank to fail: the one whose traceback is worth reading."""
    if _store is None:
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            time.sleep(SAYING_S)  # what ends every rank is said by the node's first; torchrun then ends this one
        return True
    rank = os.environ.get("RANK", "0")
    try:
        return _store.compare_set(FAILURE_KEY, "", rank).decode() == rank  # type: ignore[attr-defined]
    except Exception:
        return True


def _known_error(error: BaseException) -> str | None:
    """One line for what needs no traceback: wrong input, a full disk, a port in use."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on device while writing {error.filename or 'the run folder'}"
    if any(words in str(error) for words in FULL_DISK):
        return f"no space left on device while writing the run folder ({error})"
    if "EADDRINUSE" in str(error) or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE):
        port = os.environ.get("MASTER_PORT", "?")
        return f"port {port} is in use; choose another with torchrun --master-port"
    return None


def _traceback() -> str:
    return f"[rank {os.environ.get('RANK', '0')}] {traceback.format_exc()}".rstrip()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """Exit without waiting for threads or collectives that may never end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
