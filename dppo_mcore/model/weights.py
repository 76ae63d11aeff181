"""Hugging Face weights into Megatron's shards and out again, without a conversion step between.

Loading: every rank maps the checkpoint's files and copies its own slices straight into its parameters.
Leaving: a collective iterator of (HF name, full tensor), which export writes as it comes and the weight sync may send.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.safetensors_io import CheckpointReader, TensorSpec, plan_files, write_checkpoint
from dppo_mcore.model.weight_map import WeightEntry, WeightError, WeightMap, global_name

_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}


@dataclass(frozen=True)
class LoadReport:
    """What a rank's load took."""

    tensors: int
    bytes_requested: int
    """Bytes of the slices this rank asked the files for."""
    own_bytes: int
    """Bytes of this rank's parameters in the checkpoint's type."""
    seconds: float


def unwrap(chunk: nn.Module) -> nn.Module:
    """The model inside Megatron's wrappers (DDP, Float16Module)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def named_weights(chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """This rank's parameters, all chunks together, under Megatron's names with global layer numbers."""
    found: dict[str, nn.Parameter] = {}
    for chunk in map(unwrap, chunks):
        layers = getattr(chunk.language.decoder, "layers", ())
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            found[global_name(name, first_layer)] = parameter
    return found


def load_hf_weights(chunks: Sequence[nn.Module], folder: str | Path, qwen: QwenConfig) -> LoadReport:
    """Fill this rank's parameters from a Hugging Face folder; reads only the slices they need."""
    began = time.perf_counter()
    tp, rank = _tensor_parallel()
    weight_map = WeightMap(qwen)
    reader = CheckpointReader(Path(folder))
    in_file = weight_map.check_keys(reader.tensors, str(folder))
    for name, shape in weight_map.hf_shapes().items():
        stored = reader.tensors[in_file[name]]
        if stored.shape != shape:
            raise WeightError(
                f"{stored.file}: {in_file[name]} has shape {list(stored.shape)}, config.json asks for {list(shape)}"
            )
    own_bytes, weights = 0, named_weights(chunks)
    for name, parameter in weights.items():
        entry = weight_map[name]
        check_shape(entry, name, parameter, tp)
        shard = parameter.data
        if entry.kind == "vocab":
            shard[max(0, entry.parts[0].shape[0] - rank * shard.shape[0]) :].zero_()
        for piece in entry.pieces(shard, tp, rank):
            key = in_file[piece.tensor.name]
            part = reader.narrow(key, piece.dim, piece.start, piece.length)
            piece.view.copy_(part.view(piece.view.shape))
            own_bytes += piece.view.numel() * part.element_size()
    return LoadReport(len(weights), reader.bytes_requested, own_bytes, time.perf_counter() - began)


def check_shape(entry: WeightEntry, name: str, parameter: Tensor, tp: int) -> None:
    """Refuse a parameter whose shape isn't the map's (vocabulary: at least the checkpoint's rows over all ranks)."""
    vocab_rows = parameter.shape[0] * tp if entry.kind == "vocab" else None
    wanted = entry.shape(tp, vocab_rows)
    fits = parameter.numel() == torch.Size(wanted).numel() if entry.kind == "replicated" else parameter.shape == wanted
    if vocab_rows is not None and vocab_rows < entry.parts[0].shape[0]:
        raise WeightError(f"{name}: {vocab_rows} rows over all ranks can't hold {entry.parts[0].shape[0]} tokens")
    if not fits:
        raise WeightError(f"{name}: the model has shape {list(parameter.shape)}, the checkpoint gives {list(wanted)}")


def iter_hf_weights(
    chunks: Sequence[nn.Module], qwen: QwenConfig, *, vision: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(canonical HF name, full tensor on the device) of the whole model, in the weight map's order.

    Collective: every rank must draw the iterator to its end, and every rank gets every tensor. A tensor is gathered
    over its stage's tensor-parallel ranks, then broadcast to the other stages.
    """
    tp, _ = _tensor_parallel()
    tp_group = parallel_state.get_tensor_model_parallel_group()
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    weight_map, own = WeightMap(qwen), {}
    for name, parameter in named_weights(chunks).items():
        own[weight_map[name].name] = parameter.data
    owners = _owning_stages(weight_map, own)
    device = next(iter(own.values())).device
    for entry in weight_map.exported():
        if entry.kind == "replicated" and entry.name.startswith("vision.") and not vision:
            continue
        stage, dtype = owners[entry.name]
        mine = stage == parallel_state.get_pipeline_model_parallel_rank()
        if mine:
            shard = own[entry.name]
            shards = [shard]
            if tp > 1 and entry.kind != "replicated":
                shards = [torch.empty_like(shard) for _ in range(tp)]
                dist.all_gather(shards, shard.contiguous(), group=tp_group)
            full = dict(entry.merge(shards))
        else:
            full = {part.name: torch.empty(part.shape, dtype=dtype, device=device) for part in entry.parts}
        for part in entry.parts:
            tensor = full[part.name]
            if parallel_state.get_pipeline_model_parallel_world_size() > 1:
                dist.broadcast(tensor, dist.get_global_rank(pp_group, stage), group=pp_group)
            yield part.name, tensor


def _owning_stages(weight_map: WeightMap, own: dict[str, Tensor]) -> dict[str, tuple[int, torch.dtype]]:
    """Pipeline stage and type of every exported entry; each must live on exactly one stage."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    lists: list[dict[str, torch.dtype]] = [{} for _ in range(stages)]
    mine = {name: tensor.dtype for name, tensor in own.items()}
    if stages > 1:
        dist.all_gather_object(lists, mine, group=parallel_state.get_pipeline_model_parallel_group())
    else:
        lists = [mine]
    owners = {}
    for entry in weight_map.exported():
        stage = [(n, names[entry.name]) for n, names in enumerate(lists) if entry.name in names]
        if len(stage) != 1:
            raise WeightError(f"{entry.name} lives on {len(stage)} pipeline stages; exactly one must hold it")
        owners[entry.name] = stage[0]
    return owners


def export_hf(
    chunks: Sequence[nn.Module],
    qwen: QwenConfig,
    source_dir: str | Path,
    out_dir: str | Path,
    *,
    max_file_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> Path:
    """Write the model as a Hugging Face folder that transformers and SGLang load; collective, rank 0 writes.

    Configuration, tokenizer and processor files come from `source_dir`. The folder appears whole or not at all.
    """
    source, out = Path(source_dir), Path(out_dir)
    partial = out.with_name(out.name + ".partial")
    writer = dist.get_rank() == 0
    problem = [_refusal(source, out, overwrite) if writer else None]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise WeightError(problem[0])
    stream = iter_hf_weights(chunks, qwen)
    if writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        dtype = next(iter(named_weights(chunks).values())).dtype
        copy_side_files(source, partial, dtype)
        specs = (TensorSpec(name, dtype, shape) for name, shape in WeightMap(qwen).hf_shapes().items())
        write_checkpoint(partial, plan_files(specs, max_file_bytes), ((name, t.to(dtype)) for name, t in stream))
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    else:
        for _ in stream:
            pass
    dist.barrier()
    return out


def _refusal(source: Path, out: Path, overwrite: bool) -> str | None:
    if not (source / "config.json").is_file():
        return f"{source} has no config.json; export takes configuration and tokenizer from the starting checkpoint"
    if out.exists() and source.resolve() == out.resolve():
        return f"--out {out} is the starting checkpoint itself; choose another folder"
    if out.exists() and not out.is_dir():
        return f"--out {out} is a file; choose a folder"
    if out.exists() and any(out.iterdir()) and not overwrite:
        return f"--out {out} isn't empty; choose a new folder"
    return None


def copy_side_files(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Copy all but weights from a checkpoint folder; config.json gets the exported type."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _NOT_COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    config = json.loads((out / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    if "dtype" not in config and "torch_dtype" not in config:
        config["torch_dtype"] = name
    for section in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(section, dict) and key in section:
                section[key] = name
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _tensor_parallel() -> tuple[int, int]:
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
