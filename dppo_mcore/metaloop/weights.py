"""The engine's weights and whose memory it is: woken with present weights for rollouts, asleep while training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dppo_mcore.data.packing import pack_groups
from dppo_mcore.learn.offload import Offloader
from dppo_mcore.learn.state import Learner
from dppo_mcore.learn.step import logprobs
from dppo_mcore.metaloop.run import Run
from dppo_mcore.types import Prompt


def _push(run: Run) -> None:
    """Make the engine answer with the trainer's present weights. The version is the run's step, so that a resumed
    run gives its answers the versions they would have had."""
    if run.engine.weight_version == run.step:
        return
    began = time.perf_counter()
    if run.engine.receiver is None:
        run.engine.update_weights(run.step)
    else:
        from dppo_mcore.sync.push import push as send

        _set_probe(run)
        send(run.model.models, run.engine, run.step)
    run.metrics.log(run.step, {"time/sync": time.perf_counter() - began})


def _shares_memory(run: Run) -> bool:
    """Whether trainer and engine take turns with the same memory; a server given by URL has its own."""
    rollout = run.config.rollout
    return run.config.optimizer.offload and rollout.rollout_placement == "colocated" and not rollout.rollout_url


def rest(run: Run) -> None:
    """Until the first answers the memory is the trainer's: a checkpoint is loaded, and SFT may come first."""
    if _shares_memory(run):
        run.engine.sleep()


def _set_probe(run: Run) -> None:
    """Let the sync end with a check: the engine must give the last answer the log-probs that the trainer gives it."""
    sync, probe = getattr(run.engine, "weight_sync", None), run.probe
    if sync is None or probe is None or not isinstance(run.model, Learner):
        return
    prompt, answer = probe
    learner = run.model
    tokens = run.config.data.max_tokens_per_micro_batch

    def trainer() -> tuple[Prompt, Sequence[int], Sequence[float]]:
        batches = pack_groups([prompt], [[answer]], {}, learner.qwen, tokens, pad_multiple=learner.pad_multiple)
        return prompt, answer, logprobs(learner, batches)[0].tolist()

    sync.probe = trainer


@contextmanager
def awake(run: Run) -> Iterator[None]:
    """Inside, the engine answers, with the present weights. Collective.

    With `--offload` it has the memory then: gradients and optimizer state wait on the host meanwhile. The trainer's
    weights stay: its tower encodes the clips, and the embedded engine samples from them. After an error nothing is
    brought back, as the run ends on it.
    """
    if not (_shares_memory(run) and isinstance(run.model, Learner)):
        _push(run)
        yield
        return
    if run.offloader is None:
        run.offloader = Offloader(run.model)
    offloader = run.offloader
    stages = offloader.offload(keep_weights=True)
    _push(run)
    run.engine.wake()
    yield
    run.engine.sleep()
    stages = [*stages, *offloader.reload()]
    figures = {f"time/offload/{stage.name}": stage.seconds for stage in stages}
    figures |= {f"memory/offload/{stage.name}": float(stage.bytes) for stage in stages}
    run.metrics.log(run.step, figures)
