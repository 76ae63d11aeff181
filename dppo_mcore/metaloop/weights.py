"""The engine's weights and whose memory it is: pushing new versions, waking for rollouts, sleeping for training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dppo_mcore.metaloop.run import Run


def push(run: Run) -> None:
    """Make the engine answer with the trainer's present weights, as a new version."""
    began = time.perf_counter()
    run.version += 1
    if run.engine.receiver is None:
        run.engine.update_weights(run.version)
    else:
        from dppo_mcore.sync.push import push as send

        send(run.learner.models, run.engine, run.version)
    run.metrics.log(run.step, {"time/sync": time.perf_counter() - began})


@contextmanager
def awake(run: Run) -> Iterator[None]:
    """The engine has the memory inside this context; with `--offload` the trainer's waits on the host."""
    yield
