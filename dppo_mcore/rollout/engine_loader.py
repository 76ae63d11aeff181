"""Runs inside SGLang's scheduler processes: loads buckets out of shared memory and fingerprints what the model holds.

SGLang calls `load` as a custom weight loader (`load_format` names it). Its one entry's name is a JSON command and its
tensor is empty; the weights themselves are mapped from the trainer's memory, so a bucket crosses processes without a
copy, to every tensor-parallel rank at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dppo_mcore.rollout import wire
from dppo_mcore.rollout.fingerprint import add, fingerprint

LOADER = "dppo_mcore.rollout.engine_loader.load"

_FUSED = {
    "qkv_proj": (("q_proj", 0), ("k_proj", 1), ("v_proj", 1)),
    "gate_up_proj": (("gate_proj", 0), ("up_proj", 0)),
}
_ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj)\.weight$")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def load(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Carry out each command: `{"bucket": handle}` or `{"fingerprint": {...}}`."""
    for text, _ in named_tensors:
        command = json.loads(text)
        if "bucket" in command:
            _load_bucket(model, command["bucket"])
        else:
            _write_fingerprints(model, command["fingerprint"])


def _load_bucket(model: Any, handle: Mapping[str, Any]) -> None:
    flat = cuda_buffer(handle) if "cuda" in handle else wire.attach(handle)
    slots = [wire.Slot.from_json(value) for value in handle["slots"]]
    model.load_weights([(slot.name, slot.view(flat)) for slot in slots])
    if flat.is_cuda:
        torch.cuda.current_stream().synchronize()


def cuda_buffer(handle: Mapping[str, Any]) -> Tensor:
    """Open a CUDA IPC handle: uint8 on the device whose UUID it names."""
    import base64

    cuda = handle["cuda"]
    device = next(
        index
        for index in range(torch.cuda.device_count())
        if str(torch.cuda.get_device_properties(index).uuid) == cuda["uuid"]
    )
    arguments = list(cuda["storage"])
    for position in (1, 4, 6):
        arguments[position] = base64.b64decode(arguments[position])
    storage = torch.UntypedStorage._new_shared_cuda(device, *arguments[1:])
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)[: handle["nbytes"]]


def _write_fingerprints(model: Any, request: Mapping[str, Any]) -> None:
    """Fingerprints of this rank's shards under their Hugging Face names, into `folder`/RANK.json."""
    from sglang.srt.runtime_context import get_parallel

    rank, size = get_parallel().tp_rank, get_parallel().tp_size
    totals: dict[str, int] = {}
    for name, value in shard_fingerprints(model, request["shapes"], rank, size):
        totals[name] = add(totals.get(name, 0), value)
    target = Path(request["folder"]) / f"{rank}.json"
    part = target.with_suffix(".part")
    part.write_text(json.dumps(totals))
    part.rename(target)


def shard_fingerprints(
    model: Any, shapes: Mapping[str, Sequence[int]], rank: int, size: int
) -> Iterator[tuple[str, int]]:
    """(Hugging Face name, this rank's summand) for every parameter whose full shape is in `shapes`."""
    for name, parameter in model.named_parameters():
        fused = next((key for key in _FUSED if f".{key}." in name), None)
        if fused and not name.startswith("visual."):
            parts = [(name.replace(fused, part), is_key) for part, is_key in _FUSED[fused]]
            yield from _fused_shards(parameter.data, parts, shapes, rank, size)
        elif name in shapes:
            yield name, _plain_shard(name, parameter.data, shapes[name], rank, size)


def _fused_shards(
    fused: Tensor, parts: Sequence[tuple[str, int]], shapes: Mapping[str, Sequence[int]], rank: int, size: int
) -> Iterator[tuple[str, int]]:
    if any(part not in shapes for part, _ in parts):
        return
    whole = [shapes[part][0] for part, _ in parts]
    # With more ranks than key heads SGLang repeats heads; `copies` ranks hold the same one, and one of them counts.
    shared = sum(rows for rows, (_, is_key) in zip(whole, parts, strict=True) if is_key)
    split = sum(rows for rows, (_, is_key) in zip(whole, parts, strict=True) if not is_key) // size
    copies = (fused.shape[0] - split) * size // shared if shared else 1
    offset = 0
    for rows, (part, is_key) in zip(whole, parts, strict=True):
        count = rows * copies // size if is_key else rows // size
        shard = fused[offset : offset + count]
        offset += count
        if is_key and rank % copies:
            continue
        yield part, fingerprint(shard, row=count * (rank // copies if is_key else rank))


def _plain_shard(name: str, shard: Tensor, full: Sequence[int], rank: int, size: int) -> int:
    if name in _VOCABULARY:
        start = rank * shard.shape[0]
        return fingerprint(shard[: max(0, min(shard.shape[0], full[0] - start))], row=start)
    if name.startswith("visual.") or tuple(shard.shape) == tuple(full):
        return fingerprint(shard) if rank == 0 else 0
    if _ROW_PARALLEL.search(name):
        return fingerprint(shard, column=rank * shard.shape[1])
    return fingerprint(shard, row=rank * shard.shape[0])
