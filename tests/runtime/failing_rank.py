"""Run under torchrun by test_faults: fails, or waits for SIGTERM, as the first argument says."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from dppo_mcore.runtime import faults


def main() -> None:
    kind, folder = sys.argv[1], sys.argv[2]
    rank = int(os.environ["RANK"])
    if kind == "import" and rank == 1:
        open(os.path.join(folder, f"up-{rank}"), "w").close()
        raise ImportError("planted at import")
    if kind == "import-everywhere":
        open(os.path.join(folder, f"up-{rank}"), "w").close()
        while not os.path.exists(os.path.join(folder, f"up-{1 - rank}")):
            time.sleep(0.001)
        raise ImportError("planted at import")
    import torch
    import torch.distributed as dist

    from dppo_mcore.config import ParallelConfig
    from dppo_mcore.runtime import parallel
    from dppo_mcore.runtime.log import start_logging

    start_logging(Path(folder), rank)
    parallel.start(ParallelConfig(), seed=0)
    faults.watch()
    open(os.path.join(folder, f"up-{rank}"), "w").close()
    if kind == "forward" and rank == 1:
        raise ValueError("planted in the forward")
    if kind == "collective" and rank == 1:
        dist.all_reduce(torch.ones(3), op="planted operator")
    if kind == "waiting" and rank == 0:
        dist.barrier()  # the other rank never comes
    while kind == "waiting" or not faults.stop_requested():
        time.sleep(0.05)
    open(os.path.join(folder, f"saved-{rank}"), "w").close()
    raise faults.Preempted


if __name__ == "__main__":
    faults.run_guarded(main)
