"""A whole run on recorded rollouts: no engine is asked, and the same weights come out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

from dppo_mcore.learn import checkpoint
from tests.metaloop import harness


def saved_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a run's newest checkpoint."""
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    reader = FileSystemReader(newest)
    tensors = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in reader.read_metadata().state_dict_metadata.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def test_a_replay_needs_no_engine_and_ends_with_the_same_weights(world: Path, unbroken: Path, tmp_path: Path) -> None:
    """SGLang is named, and not started: buffer, steps, mining and evaluations find their answers in the recording."""
    changes = {"replay_rollouts": unbroken.with_name("rollouts"), "rollout_engine": "sglang"}
    harness.finish(harness.command(world, tmp_path / "run", **changes), tmp_path / "log")
    assert "sglang" not in (tmp_path / "log").read_text().lower()
    assert harness.digest(tmp_path / "run") == harness.digest(unbroken)
    replayed, original = saved_tensors(tmp_path / "run"), saved_tensors(unbroken)
    assert replayed.keys() == original.keys() and any("momentum" in name for name in original)
    assert all(torch.equal(replayed[name], tensor) for name, tensor in original.items())
