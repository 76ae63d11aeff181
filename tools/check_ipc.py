"""Whether buffers of a weight sync cross processes and are freed: `python tools/check_ipc.py [--device cuda|cpu]`.

As a sync does it: the leader makes two buffers and fills them, another process maps each by its handle, bucket after
bucket, reads what the leader wrote and writes for it. After all rounds the leader must hold what it held before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from dppo_mcore.sync import buffers  # noqa: E402  after the path

BUCKETS = 6
"""Per round, in turns through two buffers."""


def neighbour(messages: Connection) -> None:
    """Another rank: what it finds in the memory goes back, and one more is left there."""
    mapped: dict[str, torch.Tensor] = {}
    while (handle := messages.recv()) is not None:
        if handle == "round over":
            mapped.clear()
            if torch.cuda.is_available():
                torch.cuda.ipc_collect()
            messages.send(0)
            continue
        if str(handle) not in mapped:
            mapped[str(handle)] = buffers.attach(handle)
        flat = mapped[str(handle)]
        found = int(flat[-1])
        flat.fill_(found + 1)
        synchronize(flat)
        messages.send(found)
        del flat


def synchronize(flat: torch.Tensor) -> None:
    if flat.is_cuda:
        torch.cuda.synchronize()


def held(device: str) -> int:
    """Bytes on the device, or open files."""
    if device == "cpu":
        return len(os.listdir("/proc/self/fd"))
    torch.cuda.ipc_collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def sync_once(device: str, nbytes: int, messages: Connection) -> None:
    """All buckets of one sync."""
    pool = buffers.Buffers(device, nbytes, 2)
    lent: list[Any] = []
    for bucket in range(BUCKETS):
        buffer = pool.take(nbytes)
        if buffer is None:
            pool.give(lent.pop(0))
            buffer = pool.take(nbytes)
        assert buffer is not None
        flat = buffer.bytes()
        flat.fill_(bucket)
        synchronize(flat)
        messages.send(buffer.handle)
        found = messages.recv()
        if found != bucket or int(flat[0]) != bucket + 1:
            raise SystemExit(f"bucket {bucket}: the neighbour read {found} and left {int(flat[0])}")
        lent.append(buffer)
    for buffer in lent:
        pool.give(buffer)
    messages.send("round over")
    messages.recv()
    pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="syncs")
    parser.add_argument("--mib", type=int, default=256, help="size of a bucket")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    messages, theirs = context.Pipe()
    process = context.Process(target=neighbour, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    after = []
    for _ in range(options.rounds):
        sync_once(options.device, options.mib << 20, messages)
        after.append(held(options.device))
    messages.send(None)
    process.join(30)
    figures = {"device": options.device, "unit": "bytes" if options.device == "cuda" else "files", "held": after}
    print(json.dumps(figures))
    if options.json:
        Path(options.json).write_text(json.dumps(figures) + "\n")
    if after[-1] > after[0]:
        raise SystemExit(
            f"{after[-1] - after[0]} {figures['unit']} more after {options.rounds} rounds than after the first"
        )


if __name__ == "__main__":
    main()
