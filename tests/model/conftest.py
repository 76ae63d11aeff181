"""Checkpoints and oracle results for the model's tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dppo_mcore.model.config import QwenConfig, load_qwen_config
from dppo_mcore.types import PackedBatch
from tests.model.cases import Conversation, conversation, mixed_conversations, pack
from tests.model.reference import load_reference, reference_gradients, reference_loss


@dataclass(frozen=True)
class Case:
    """A checkpoint, micro-batches, and the file with the oracle's log-probs per micro-batch and gradients."""

    folder: str
    rows: list[list[Conversation]]
    batches: list[PackedBatch]
    oracle: str


def _calm(source: str, folder: Path) -> str:
    """A copy whose matrices are 0.6 times as large. At the full size the oracle's own log-probs are 2.4e-6 from their
    fp64 values, which leaves no room to measure 2e-6."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    scaled = {name: tensor * 0.6 if tensor.dim() > 1 else tensor for name, tensor in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="session")
def calm_dir(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny checkpoint for comparisons in fp32."""
    return _calm(tiny_dir, tmp_path_factory.mktemp("calm") / "untied")


@pytest.fixture(scope="session")
def calm_tied_dir(tiny_tied_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, tied."""
    return _calm(tiny_tied_dir, tmp_path_factory.mktemp("calm") / "tied")


@pytest.fixture(scope="session")
def qwen(calm_dir: str) -> QwenConfig:
    """The tiny architecture."""
    return load_qwen_config(calm_dir)


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Builds a case from rows of conversations, asking the oracle."""

    def make(folder: str, rows: Sequence[Sequence[Conversation]]) -> Case:
        qwen = load_qwen_config(folder)
        model = load_reference(folder)
        loss, logprobs = reference_loss(model, [item for row in rows for item in row], qwen)
        loss.backward()
        queue = iter(logprobs)
        per_row = [torch.cat([next(queue) for item in row for _ in item.answers]) for row in rows]
        oracle = tmp_path_factory.mktemp("oracle") / "oracle.pt"
        torch.save({"logprobs": per_row, "gradients": reference_gradients(model)}, oracle)
        return Case(folder, [list(row) for row in rows], [pack(row, qwen) for row in rows], str(oracle))

    return make


def mixed_rows(qwen: QwenConfig) -> list[list[Conversation]]:
    """Four micro-batches: image and clip packed, text alone, several media packed, text again."""
    items = mixed_conversations(qwen)
    return [items[:2], items[2:3], items[3:5], items[5:]]


def group_rows(qwen: QwenConfig) -> list[list[Conversation]]:
    """Four micro-batches of shared prompts with 1, 3 and 8 uneven answers, with and without media."""
    clip, image = ((3, 4, 4), 0.7), ((1, 6, 4), None)
    return [
        [conversation(qwen, "g3", 11, [clip], [5, 1, 9])],
        [conversation(qwen, "g8", 12, [], [3, 8, 1, 6, 2, 7, 4, 5], text=19)],
        [conversation(qwen, "g1", 13, [image], [6]), conversation(qwen, "g3b", 14, [image, clip], [2, 7, 4])],
        [conversation(qwen, "g8b", 15, [clip, clip], [1, 2, 3, 4, 5, 6, 7, 8])],
    ]


@pytest.fixture(scope="session")
def mixed_case(calm_dir: str, qwen: QwenConfig, make_case: Callable[..., Case]) -> Case:
    """Plain conversations, packed."""
    return make_case(calm_dir, mixed_rows(qwen))


@pytest.fixture(scope="session")
def tied_case(calm_tied_dir: str, qwen: QwenConfig, make_case: Callable[..., Case]) -> Case:
    """The same with tied embeddings."""
    return make_case(calm_tied_dir, mixed_rows(qwen))


@pytest.fixture(scope="session")
def group_case(calm_dir: str, qwen: QwenConfig, make_case: Callable[..., Case]) -> Case:
    """Groups with shared prompts."""
    return make_case(calm_dir, group_rows(qwen))
