"""Runs the model on a rank: build, load, schedule over micro-batches, gradients against the oracle's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from dppo_kernels import linear_logprob
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dppo_mcore.config import Config, ModelConfig, ParallelConfig
from dppo_mcore.model.config import QwenConfig, load_qwen_config
from dppo_mcore.model.model import QwenVL, build_model
from dppo_mcore.model.weight_map import WeightMap
from dppo_mcore.model.weights import load_hf_weights, named_weights
from dppo_mcore.runtime import parallel as runtime_parallel
from dppo_mcore.types import PackedBatch

TRAIN_ALL = ModelConfig(dtype="fp32", freeze_vision=False)


def layout(tp: int = 1, pp: int = 1, vpp: int | None = None, sp: bool = False, **extra: Any) -> ParallelConfig:
    """A layout in short."""
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sp,
        **extra,
    )


def start_model(
    folder: str, parallel: ParallelConfig, model: ModelConfig = TRAIN_ALL
) -> tuple[QwenConfig, list[QwenVL]]:
    """Lay the groups, build this rank's chunks and load the checkpoint."""
    runtime_parallel.reinit(parallel, seed=0)
    qwen = load_qwen_config(folder)
    chunks = build_model(qwen, replace(Config(), parallel=parallel, model=model))
    load_hf_weights(chunks, folder, qwen)
    return qwen, chunks


def wrap(chunks: Sequence[QwenVL], distributed_optimizer: bool = False, overlap: bool = False) -> list[Any]:
    """Megatron's data-parallel wrappers, gradients reduced in fp32 and summed; with `overlap` in many small buckets."""
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        bucket_size=256 if overlap else None,
    )
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if overlap:
        config.no_sync_func = [w.no_sync for w in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def head_logprobs(chunk: QwenVL, hidden_RH: Tensor, batch: PackedBatch) -> Tensor:
    """Log-probs [R] of the targets through the vocabulary-parallel head."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    weight = chunk.head_weight()
    return linear_logprob(
        hidden_RH,
        weight,
        batch.targets_R,
        group=parallel_state.get_tensor_model_parallel_group(),
        vocab_start=rank * weight.shape[0],
        vocab_size=chunk.qwen.vocab_size,
    )[0]


def run_schedule(wrapped: Sequence[Any], batches: Sequence[PackedBatch], forward_only: bool = False) -> list[Tensor]:
    """Forward and backward over micro-batches; the last stage's log-probs of each."""
    for chunk in wrapped:
        if not forward_only:
            chunk.zero_grad_buffer()

    def forward_step(batch_iterator: Any, model: Any) -> Any:
        batch = next(batch_iterator)
        output = model(batch)

        def loss(hidden_RH: Tensor) -> Any:
            logprobs = head_logprobs(model.module, hidden_RH, batch)
            total = (logprobs * batch.columns["weights"]).sum()
            return total, torch.tensor(logprobs.numel(), dtype=torch.int), logprobs.detach()

        return output, loss

    iterators = [iter(batches) for _ in wrapped]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=list(wrapped) if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def gradient_errors(chunks: Sequence[QwenVL], qwen: QwenConfig, expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each HF tensor this rank holds a piece of: largest difference over the tensor's largest gradient."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    errors: dict[str, float] = {}
    for name, parameter in named_weights(chunks).items():
        if not parameter.requires_grad:
            continue
        for piece in WeightMap(qwen)[name].pieces(parameter.main_grad, tp, rank):
            full = expected[piece.tensor.name]
            difference = (piece.view - piece.of(full)).abs().max() if piece.numel else torch.zeros(())
            errors[piece.tensor.name] = float(difference / full.abs().max())
    return errors


def parity(
    folder: str,
    parallel: ParallelConfig,
    model: ModelConfig,
    batches: Sequence[PackedBatch],
    oracle: str,
    overlap: bool = False,
) -> dict[str, Any]:
    """On a rank: log-prob and gradient errors of one step against the oracle saved in the file `oracle`.

    With `overlap` it is the second step: in the first Megatron starts no reduction before the backward pass has ended.
    """
    expected = torch.load(oracle)
    qwen, chunks = start_model(folder, parallel, model)
    wrapped = wrap(chunks, overlap=overlap)
    mine = list(enumerate(batches))[
        parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()
    ]
    for _ in range(2 if overlap else 1):
        outputs = run_schedule(wrapped, [batch for _, batch in mine])
    logprob_error = max(
        (
            float((got - expected["logprobs"][index]).abs().max())
            for got, (index, _) in zip(outputs, mine, strict=False)
        ),
        default=0.0,
    )
    errors = gradient_errors(chunks, qwen, expected["gradients"])
    worst = max(errors, key=errors.__getitem__, default="none")
    dist.barrier()
    return {"outputs": len(outputs), "logprob": logprob_error, "gradient": errors.get(worst, 0.0), "worst": worst}


def gradient_orders(
    folder: str, parallel: ParallelConfig, model: ModelConfig, batches: Sequence[PackedBatch]
) -> list[list[str]]:
    """On a rank: the order in which each row's backward pass finishes the parameters' gradients."""
    _, chunks = start_model(folder, parallel, model)
    finished: list[str] = []
    for name, parameter in chunks[0].named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: finished.append(name))
    orders = []
    for batch in batches:
        (head_logprobs(chunks[0], chunks[0](batch), batch) * batch.columns["weights"]).sum().backward()
        orders.append(finished.copy())
        finished.clear()
    return orders


def training(
    folder: str,
    parallel: ParallelConfig,
    model: ModelConfig,
    batches: Sequence[PackedBatch],
    weights: str,
    steps: int,
) -> dict[str, Any]:
    """On a rank: losses of AdamW steps with the distributed optimizer, and the largest difference of a weight from
    those saved in the file `weights`."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    expected = torch.load(weights)
    qwen, chunks = start_model(folder, parallel, model)
    wrapped = wrap(chunks, distributed_optimizer=True)
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-4, adam_eps=1e-5, weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=True,
        params_dtype=torch.float32,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, wrapped)
    data_rank, data_ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = list(batches)[data_rank::data_ranks]
    losses: list[float] = []
    for _ in range(steps):
        outputs = run_schedule(wrapped, mine)
        optimizer.step()
        pairs = zip(outputs, mine, strict=False)
        total = torch.tensor(
            [sum(float((lp * batch.columns["weights"]).sum()) for lp, batch in pairs)], dtype=torch.float32
        )
        tp = parallel_state.get_tensor_model_parallel_world_size()
        dist.all_reduce(total)
        losses.append(float(total) / tp / sum(len(batch.targets_R) for batch in batches))
    worst = 0.0
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in named_weights(chunks).items():
        for piece in WeightMap(qwen)[name].pieces(parameter.data, tp, tp_rank):
            if piece.numel:
                worst = max(worst, float((piece.view - piece.of(expected[piece.tensor.name])).abs().max()))
    return {"losses": losses, "weight": worst}


def encode_and_differentiate(
    parallel: ParallelConfig,
    folder: str,
    model: ModelConfig,
    patches_P: Tensor,
    grids: tuple[tuple[int, int, int], ...],
) -> dict[str, Any]:
    """On a rank: media embeddings, operations of encoding them, and gradients of a weighted sum after reduction."""
    from flops import count_flops

    _, chunks = start_model(folder, parallel, model)
    wrapped = wrap(chunks)
    flops = count_flops(lambda: chunks[0].encode_media(patches_P, grids))
    wrapped[0].zero_grad_buffer()
    embeddings = chunks[0].encode_media(patches_P, grids)
    weight = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(5))
    (embeddings * weight).sum().backward()
    finalize_model_grads(wrapped)
    ranks = parallel_state.get_data_parallel_world_size()
    gradients = {name: p.main_grad.clone() / ranks for name, p in chunks[0].vision.named_parameters()}
    return {"embeddings": embeddings.detach(), "flops": flops, "gradients": gradients}


def optimizer_elements(folder: str, parallel: ParallelConfig, model: ModelConfig) -> dict[str, int]:
    """On a rank: parameter elements that Megatron's optimizer holds, and those of the model's parts."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    _, chunks = start_model(folder, parallel, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-4, params_dtype=torch.float32), wrap(chunks)
    )
    parts = {"vision": chunks[0].vision, "merger": chunks[0].vision.merger, "language": chunks[0].language}
    held = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return {"optimizer": held} | {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def bf16_logprobs(folder: str, parallel: ParallelConfig, batch: PackedBatch) -> Tensor:
    """On a rank: log-probs of one row in bf16."""
    _, chunks = start_model(folder, parallel, replace(TRAIN_ALL, dtype="bf16"))
    with torch.no_grad():
        return head_logprobs(chunks[0], chunks[0](batch), batch)
