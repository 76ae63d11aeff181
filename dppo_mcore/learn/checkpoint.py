"""Checkpoints: whole or not there, loadable under any layout, bitwise on the same one.

A checkpoint is written to a hidden folder beside its place, renamed once every rank is done, and named by the
`latest` file after that; one that goes is renamed first. So whatever instant a run is killed at, a folder with a plain
name is complete. Hidden folders have names of their own: what a killed run's writer still does reaches no later one.
"""

from __future__ import annotations

import json
import pickle
import queue
import random
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from dppo_mcore.config import RunConfig
from dppo_mcore.learn.state import Learner
from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.weights import load_hf_weights
from dppo_mcore.runtime.errors import UserError
from dppo_mcore.runtime.files import replacing

LATEST, META = "latest", "dppo.json"


@dataclass
class Saver:
    """Writes checkpoints into one folder and keeps the last few and the best."""

    folder: Path
    keep: int = 2
    background: bool = True
    _calls: AsyncCallsQueue | None = field(default=None, repr=False)

    def save(self, state: Learner, step: int, extra: dict[str, Any], score: float | None = None) -> Path:
        """Write checkpoint number `step`; `extra` is the caller's JSON, `score` its best-metric value.

        In the background the call returns once tensors are copied; `poll` or `finish` completes it.
        """
        self.finish()
        meta: dict[str, Any] = {
            "step": step,
            "score": score,
            "learner": state.state_dict(),
            "layout": layout(state),
            "reference": None,
            "extra": extra,
        }
        if state.reference is not None:
            meta["reference"] = f"reference-{state.reference.step:08d}"
            self._save_reference(state, meta["reference"])
        self._write(_sharded_state(state, loading=False), f"step-{step:08d}", meta, self.background)
        return self.folder / f"step-{step:08d}"

    def rate(self, extra: dict[str, Any], score: float) -> None:
        """Give the newest checkpoint, if it is the one with `extra`, the score that an evaluation found later."""
        self.finish()
        newest = latest(self.folder) if dist.get_rank() == 0 else None
        if newest is None or (meta := read_meta(newest))["extra"] != extra or meta["score"] == score:
            return
        with replacing(newest / META) as file:
            json.dump({**meta, "score": score}, file)
        self._prune()

    def _save_reference(self, state: Learner, name: str) -> None:
        """The reference policy's weights, written once for all checkpoints that go with it."""
        exists = [(self.folder / name / META).is_file()]
        dist.broadcast_object_list(exists)
        if not exists[0] and state.reference is not None:
            with state.reference.in_place():
                self._write(_sharded_state(state, loading=False, weights_only=True), name, {}, background=False)

    def _write(self, sharded: dict[str, Any], name: str, meta: dict[str, Any], background: bool) -> None:
        box = [_hidden(self.folder / name)]
        dist.broadcast_object_list(box)
        beside = box[0]
        if dist.get_rank() == 0:
            _sweep(self.folder)
            beside.mkdir(parents=True)
        dist.barrier()
        filesystem_async._results_queue = ResultFile(beside / f"written-by-{dist.get_rank()}")
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy("torch_dist", 1), _data_parallel(), do_cache_distribution=False
        )
        with self._failures_named():
            request = dist_checkpointing.save(sharded, str(beside), strategy, async_sharded_save=background)
        # As text now: the caller's state may have moved on when a background save is published.
        publish = partial(self._publish, beside, self.folder / name, json.dumps(meta))
        if request is None:
            dist.barrier()
            publish()
            return
        request.add_finalize_fn(publish)
        if self._calls is None:
            self._calls = AsyncCallsQueue()
        self._calls.schedule_async_request(request)

    def poll(self) -> None:
        """Complete a background save that is done; called once a step, on all ranks."""
        self._complete(blocking=False)

    def finish(self) -> None:
        """Wait for a background save."""
        self._complete(blocking=True)

    def _complete(self, blocking: bool) -> None:
        if self._calls is not None:
            with self._failures_named():
                self._calls.maybe_finalize_async_calls(blocking=blocking)

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """A failed write as one line that says which checkpoint there still is."""
        try:
            yield
        except (CheckpointException, OSError) as failure:
            failures = {dist.get_rank(): (failure, None)} if isinstance(failure, OSError) else failure.failures
            reasons = "; ".join(f"rank {rank}: {error}" for rank, (error, _) in sorted(failures.items()))
            newest = latest(self.folder)
            left = f"the newest complete one is {newest.name}" if newest else "there is no complete one"
            free = shutil.disk_usage(self.folder).free >> 20
            raise UserError(
                f"--save {self.folder}: no checkpoint could be written ({reasons}); {free} MiB are free there; {left}"
            ) from failure

    def _publish(self, written: Path, final: Path, meta: str) -> None:
        if dist.get_rank() == 0:
            with replacing(written / META) as file:
                file.write(meta)
            _discard(final)
            written.rename(final)
            if final.name.startswith("step-"):
                with replacing(self.folder / LATEST) as file:
                    file.write(final.name)
                self._prune()
        dist.barrier()

    def _prune(self) -> None:
        highest = best(self.folder)
        for path in checkpoints(self.folder)[: -self.keep] if self.keep > 0 else []:
            if path != highest:
                _discard(path)
        needed = {read_meta(path)["reference"] for path in checkpoints(self.folder)}
        for path in self.folder.glob("reference-*"):
            if path.name not in needed:
                _discard(path)


def _hidden(path: Path) -> Path:
    """A name beside `path` that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _discard(path: Path) -> None:
    """Remove a checkpoint so that it is never half there under its own name."""
    if path.is_dir():
        shutil.rmtree(path.rename(_hidden(path)), ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what killed runs left unfinished."""
    for path in folder.glob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


class ResultFile:
    """One message from the process that writes a checkpoint to the one that waits for it.

    Megatron passes it through a manager process, which takes seconds to start and outlives a killed run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, message: Any) -> None:
        """Leave the message."""
        with replacing(self.path, "wb") as file:
            pickle.dump(message, file)

    def get_nowait(self) -> Any:
        """Take the message."""
        if not self.path.is_file():
            raise queue.Empty
        message = pickle.loads(self.path.read_bytes())
        self.path.unlink()
        return message


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / META).is_file())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    marker = folder / LATEST
    if marker.is_file() and (folder / marker.read_text().strip() / META).is_file():
        return folder / marker.read_text().strip()
    found = checkpoints(folder)
    return found[-1] if found else None


def best(folder: Path) -> Path | None:
    """The checkpoint with the highest score, or None where none has one."""
    scored = [(meta["score"], path) for path in checkpoints(folder) if (meta := read_meta(path))["score"] is not None]
    return max(scored)[1] if scored else None


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's step, score, counters, layout and the caller's extra state."""
    return json.loads((path / META).read_text())


def find(path: Path) -> Path:
    """A checkpoint given itself or its folder."""
    found = path if (path / META).is_file() else latest(path)
    if found is None:
        raise UserError(f"--load {path}: no complete checkpoint there")
    return found


def load(state: Learner, path: Path, weights_only: bool = False) -> dict[str, Any]:
    """Fill the learner from a checkpoint written under any layout; returns the caller's extra state.

    Under the same layout the run goes on bit for bit. Under another, generators are seeded anew.
    """
    path = find(path)
    meta = read_meta(path)
    same_layout = meta["layout"] == layout(state)
    if meta["reference"] and not weights_only:
        _read(state.models, path.parent / meta["reference"], _sharded_state(state, loading=True, weights_only=True))
        state.load_state_dict(meta["learner"])
        state.keep_reference()
        state.reference.step = int(meta["reference"].rsplit("-", 1)[1])
    sharded = _sharded_state(state, loading=True, weights_only=weights_only, rng=same_layout and not weights_only)
    loaded = _read(state.models, path, sharded)
    if weights_only:
        state.optimizer.reload_model_params()
        return meta["extra"]
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.load_state_dict(meta["learner"])
    if same_layout:
        set_rng_state(loaded["rng"])
    return meta["extra"]


def load_weights(models: Sequence[torch.nn.Module], path: Path) -> None:
    """Fill bare model chunks from a checkpoint written under any layout; no optimizer is needed."""
    _read(models, find(path), _model_state(models))


def load_start(models: Sequence[Any], run: RunConfig, qwen: QwenConfig) -> None:
    """Fill bare model chunks with the weights of the checkpoint `--load`, or without one of `--model`."""
    if run.load:
        load_weights(models, Path(run.load))
    else:
        load_hf_weights(models, run.model, qwen)


def _read(models: Sequence[torch.nn.Module], path: Path, sharded: dict[str, Any]) -> dict[str, Any]:
    """Load a folder's tensors; the weights go into the model."""
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), _data_parallel())
    loaded = dist_checkpointing.load(sharded, str(path), strategy)
    for index, model in enumerate(models):
        model.load_state_dict(loaded[f"model{index}"])
    return loaded


def layout(state: Learner) -> list[int]:
    """What must be equal for a bitwise resume: world size and parallel sizes."""
    parallel = state.config.parallel
    return [
        dist.get_world_size(),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
    ]


def rng_state() -> dict[str, Any]:
    """Every generator of this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator of this rank back."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _sharded_state(state: Learner, *, loading: bool, weights_only: bool = False, rng: bool = True) -> dict[str, Any]:
    sharded = _model_state(state.models)
    if not weights_only:
        sharded["optimizer"] = state.optimizer.sharded_state_dict(sharded, loading)
        if rng:
            world = dist.get_world_size()
            sharded["rng"] = ShardedObject("rng", rng_state(), (world,), (dist.get_rank(),), replica_id=0)
    return sharded


def _model_state(models: Sequence[torch.nn.Module]) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": _data_parallel(),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    return {f"model{index}": model.sharded_state_dict(metadata=metadata) for index, model in enumerate(models)}


def _data_parallel() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
