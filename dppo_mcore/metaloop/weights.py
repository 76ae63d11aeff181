"""The engine's weights and whose memory it is: pushing new versions, waking for rollouts, sleeping for training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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

        send(run.model.models, run.engine, run.step)
    run.metrics.log(run.step, {"time/sync": time.perf_counter() - began})


@contextmanager
def awake(run: Run) -> Iterator[None]:
    """The engine has the memory inside this context; with `--offload` the trainer's waits on the host."""
    yield
