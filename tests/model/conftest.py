"""Checkpoints and oracle results for the model's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@pytest.fixture(scope="session")
def qwen(tiny_dir: str) -> QwenConfig:
    """The tiny architecture."""
    return load_qwen_config(tiny_dir)


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
def mixed_case(tiny_dir: str, qwen: QwenConfig, make_case: Callable[..., Case]) -> Case:
    """Plain conversations, packed."""
    return make_case(tiny_dir, mixed_rows(qwen))


@pytest.fixture(scope="session")
def tied_case(tiny_tied_dir: str, qwen: QwenConfig, make_case: Callable[..., Case]) -> Case:
    """The same with tied embeddings."""
    return make_case(tiny_tied_dir, mixed_rows(qwen))


@pytest.fixture(scope="session")
def odd_case(tiny_odd_dir: str, qwen: QwenConfig, make_case: Callable[..., Case]) -> Case:
    """Tied, with padding rows in embedding and head."""
    return make_case(tiny_odd_dir, [*mixed_rows(qwen)[:2], *group_rows(qwen)[2:]])


@pytest.fixture(scope="session")
def group_case(tiny_dir: str, qwen: QwenConfig, make_case: Callable[..., Case]) -> Case:
    """Groups with shared prompts."""
    return make_case(tiny_dir, group_rows(qwen))
