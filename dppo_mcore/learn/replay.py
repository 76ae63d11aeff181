"""Recorded rollout batches: train again on them without an engine, bit for bit.

A batch's groups lie in `NAME.rank-RRRR-of-SSSS.pt`, one file per data-parallel rank, as plain containers and tensors,
so that reading one runs no code.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dppo_mcore.learn.rl import Group
from dppo_mcore.runtime.errors import UserError
from dppo_mcore.types import FramePlan, Media, Prompt, PromptMedia, Rollout, Sample, ScoredRollout, Turn

RECORDS = {
    kind.__name__: kind for kind in (FramePlan, Group, Media, Prompt, PromptMedia, Rollout, Sample, ScoredRollout, Turn)
}


def dump(folder: Path, name: str, groups: Sequence[Group]) -> None:
    """Write this data-parallel rank's groups of a batch; other ranks of the replica hold the same and write nothing."""
    if parallel_state.get_model_parallel_group().rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    target = folder / f"{_file_name(name)}.rank-{rank:04d}-of-{size:04d}.pt"
    beside = target.with_suffix(f".{os.getpid()}.part")
    torch.save(_plain(list(groups)), beside)
    beside.rename(target)


def replay(folder: Path, name: str) -> list[Group]:
    """This data-parallel rank's groups of a recorded batch; another number of ranks deals them out anew."""
    files = sorted(folder.glob(f"{glob.escape(_file_name(name))}.rank-*-of-*.pt"))
    if not files:
        raise UserError(f"--replay-rollouts {folder}: no recorded batch {name!r}")
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    recorded = int(files[0].stem.rsplit("-", 1)[1])
    if len(files) != recorded:
        raise UserError(f"--replay-rollouts {folder}: {name!r} has {len(files)} of {recorded} files")
    if recorded == size:
        return _read(files[rank])
    return [group for file in files for group in _read(file)][rank::size]


def _file_name(name: str) -> str:
    return name.replace(" ", "_").replace("/", "-")


def _read(path: Path) -> list[Group]:
    return _rich(torch.load(path, map_location="cpu", weights_only=True))


def _plain(value: Any) -> Any:
    """Records as dictionaries that name their kind."""
    if is_dataclass(value):
        return {"record": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict) or hasattr(value, "items"):
        return {"mapping": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_plain(item) for item in value]}
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    return value


def _rich(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "record" in value:
        entries = {name: _rich(item) for name, item in value.items() if name != "record"}
        return RECORDS[value["record"]](**entries)
    if "mapping" in value:
        return {_rich(key): _rich(item) for key, item in value["mapping"]}
    if "list" in value:
        return [_rich(item) for item in value["list"]]
    return tuple(_rich(item) for item in value["tuple"])
