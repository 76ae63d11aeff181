"""A reward worker: `python -m dppo_mcore.rewards.worker`, driven over pipes by `rewards.pool`.

A process of its own, not a fork: a scorer that hangs, crashes or eats memory takes nothing of the trainer with it.
Messages are pickles behind their length. A task list comes in, scores go out one by one, in order.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import struct
import sys
from typing import IO, Any

from dppo_mcore.rewards.registry import load_objectives
from dppo_mcore.rewards.scoring import score

LENGTH = struct.Struct("<Q")
PR_SET_PDEATHSIG = 1


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message; EOFError where the other side is gone."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(LENGTH.unpack(head)[0]))


def main() -> None:
    """Serve until the pipe closes."""
    if sys.platform == "linux":
        # A scorer that hangs wouldn't notice the pipe closing when the run is killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbound = os.fdopen(os.dup(0), "rb")
    outbound = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a scorer prints must not end up between messages
    try:
        rubric, objectives = receive(inbound)
        try:
            load_objectives(objectives)
        except Exception as error:
            send(outbound, f"{type(error).__name__}: {error}")
            return
        send(outbound, None)
        while True:
            for sample, text in receive(inbound):
                send(outbound, score(sample, text, rubric))
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
