"""What a training process holds: wrapped model chunks, optimizer, schedule and counters."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from dppo_mcore.config import Config
from dppo_mcore.learn.loss import Head
from dppo_mcore.learn.optimizer import Optimizer, make_optimizer
from dppo_mcore.learn.schedule import Schedule, phase_schedule
from dppo_mcore.model.config import QwenConfig, load_qwen_config
from dppo_mcore.model.model import QwenVL, build_model
from dppo_mcore.runtime.log import get_logger

if TYPE_CHECKING:
    from dppo_mcore.learn.reference import Reference


@dataclass
class Progress:
    """Counters that a checkpoint carries."""

    phase: str = ""
    phase_steps: int = 0
    """Optimizer steps of this phase: what the schedule counts."""
    total_steps: int = 0
    """Optimizer steps of the run."""
    bad_in_a_row: int = 0
    bad_total: int = 0

    def count(self, applied: bool) -> None:
        """One more step, applied or skipped."""
        if applied:
            self.phase_steps += 1
            self.total_steps += 1
            self.bad_in_a_row = 0
        else:
            self.bad_in_a_row += 1
            self.bad_total += 1


@dataclass
class Learner:
    """The training side of one rank."""

    config: Config
    qwen: QwenConfig
    chunks: list[DistributedDataParallel]
    """Model chunks as the schedule runs them; one, or one per virtual stage."""
    optimizer: Optimizer
    schedule: Schedule
    progress: Progress = field(default_factory=Progress)
    reference: Reference | None = None
    log: logging.Logger = field(default_factory=lambda: get_logger("learn"))

    @property
    def models(self) -> list[QwenVL]:
        """The bare chunks."""
        return [chunk.module for chunk in self.chunks]

    @property
    def pad_multiple(self) -> int:
        """What a packed row's length must be a multiple of."""
        parallel = self.config.parallel
        return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1

    def keep_reference(self) -> None:
        """Make the present weights the reference policy (at the start of each loop)."""
        from dppo_mcore.learn.reference import Reference

        if self.reference is None:
            self.reference = Reference(self.models, self.progress.total_steps)
        else:
            self.reference.reset(self.progress.total_steps)

    def head(self) -> Head | None:
        """The vocabulary projection, on the last stage."""
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return None
        weight_VH = self.models[-1].head_weight()
        tensor_parallel = parallel_state.get_tensor_model_parallel_group()
        rank, size = tensor_parallel.rank(), tensor_parallel.size()
        return Head(
            weight_VH=weight_VH,
            group=tensor_parallel if size > 1 else None,
            vocab_start=rank * weight_VH.shape[0],
            vocab_size=self.qwen.vocab_size,
        )

    def begin_phase(self, name: str, lr: float, total_steps: int) -> None:
        """Start a phase: its own schedule from step 0, and an optimizer without the last phase's moments."""
        self.schedule = phase_schedule(self.config.optimizer, lr, total_steps)
        self.progress.phase, self.progress.phase_steps = name, 0
        self.optimizer.reset()

    def continue_phase(self, lr: float, total_steps: int) -> None:
        """Go on inside a loaded phase: its step stays, its schedule is that of the present options."""
        schedule = phase_schedule(self.config.optimizer, lr, total_steps)
        if schedule != self.schedule:
            name, step = self.progress.phase, self.progress.phase_steps
            self.log.warning("%s goes on from step %d as %s; it was %s", name, step, schedule, self.schedule)
        self.schedule = schedule

    def state_dict(self) -> dict[str, Any]:
        """Counters and schedule as JSON."""
        return {"progress": asdict(self.progress), "schedule": asdict(self.schedule)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take counters and schedule back."""
        self.progress = Progress(**saved["progress"])
        self.schedule = Schedule(**saved["schedule"])


def build(config: Config, *, load_weights: bool = True) -> Learner:
    """Model chunks with fp32 gradient buffers and their optimizer; `run.model`'s weights unless told otherwise."""
    qwen = load_qwen_config(config.run.model)
    models = build_model(qwen, config)
    if load_weights:
        from dppo_mcore.model.weights import load_hf_weights

        load_hf_weights(models, config.run.model, qwen)
    return wrap(config, qwen, models)


def wrap(config: Config, qwen: QwenConfig, models: list[QwenVL]) -> Learner:
    """A learner around built model chunks."""
    transformer = models[0].config
    # Our losses arrive normalised: Megatron must neither divide by micro-batches nor average over ranks.
    transformer.calculate_per_token_loss = True
    layer_wise = config.optimizer.optimizer == "muon"
    overlap = _overlap(config)
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=not layer_wise,
        overlap_grad_reduce=overlap,
        overlap_param_gather=False,
        check_for_nan_in_grad=False,
    )
    chunks = [
        DistributedDataParallel(transformer, replace(buffers), model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]
    for model in models:
        model.config.finalize_model_grads_func = _finalize
        if overlap:
            syncs = [chunk.no_sync for chunk in chunks]
            model.config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    optimizer = make_optimizer(config, chunks)
    return Learner(config, qwen, chunks, optimizer, Schedule(0.0))


def _overlap(config: Config) -> bool:
    """Gradient reduction beside the backward pass, where there is something to reduce over."""
    return config.optimizer.overlap_grad_reduce and parallel_state.get_data_parallel_world_size() > 1


def _finalize(chunks: list[DistributedDataParallel], num_tokens: Any = None, **groups: Any) -> None:
    """Megatron's gradient reductions without its division by tokens."""
    finalize_model_grads(chunks, None, **groups)
