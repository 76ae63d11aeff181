"""The engine's weights and whose memory it is: pushing new versions, waking for rollouts, sleeping for training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dppo_mcore.learn.offload import Offloader
from dppo_mcore.learn.state import Learner
from dppo_mcore.metaloop.run import Run


def push(run: Run) -> None:
    """Make the engine answer with the trainer's present weights. The version is the run's step, so that a resumed
    run gives its answers the versions they would have had."""
    if run.engine.weight_version == run.step:
        return
    began = time.perf_counter()
    if run.engine.receiver is None:
        run.engine.update_weights(run.step)
    else:
        from dppo_mcore.sync.push import push as send

        if run.config.optimizer.offload:
            run.engine.wake(("weights",))
        send(run.model.models, run.engine, run.step)
    run.metrics.log(run.step, {"time/sync": time.perf_counter() - began})


@contextmanager
def awake(run: Run) -> Iterator[None]:
    """Inside, the engine has the memory; with `--offload` gradients and optimizer state wait on the host meanwhile.

    The weights stay: the trainer's tower encodes the clips, and the embedded engine samples from them.
    """
    if not (run.config.optimizer.offload and isinstance(run.model, Learner)):
        yield
        return
    if run.offloader is None:
        run.offloader = Offloader(run.model)
    offloader = run.offloader
    stages = offloader.offload(keep_weights=True)
    run.engine.wake(("kv_cache",))
    try:
        yield
    finally:
        run.engine.sleep()
        stages = [*stages, *offloader.reload()]
        figures = {f"time/offload/{stage.name}": stage.seconds for stage in stages}
        figures |= {f"memory/offload/{stage.name}": float(stage.bytes) for stage in stages}
        run.metrics.log(run.step, figures)
