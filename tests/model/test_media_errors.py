"""A row whose media tokens and features disagree never reaches the layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dppo_mcore.model.config import QwenConfig
from dppo_mcore.model.media import check_media
from dppo_mcore.types import PackedBatch, SequenceRef
from tests.model.cases import conversation, pack


@pytest.fixture
def batch(qwen: QwenConfig) -> PackedBatch:
    """Two samples with media in one row."""
    first = conversation(qwen, "first", 1, [((1, 4, 6), None)])
    second = conversation(qwen, "second", 2, [((2, 4, 4), 1.0)])
    return pack([first, second], qwen)


def test_a_good_row_passes(batch: PackedBatch, qwen: QwenConfig) -> None:
    check_media(batch, qwen)


def test_media_token_without_features_names_its_sample(batch: PackedBatch, qwen: QwenConfig) -> None:
    broken = replace(batch, media_rows_M=batch.media_rows_M[:-3])
    with pytest.raises(ValueError, match="sample second: 3 media tokens have no features"):
        check_media(broken, qwen)


def test_media_token_in_an_answer_names_its_sample(batch: PackedBatch, qwen: QwenConfig) -> None:
    ids_L = batch.token_ids_L.clone()
    ids_L[batch.loss_rows_R[3]] = qwen.image_token_id
    with pytest.raises(ValueError, match="sample first: 1 media tokens have no features"):
        check_media(replace(batch, token_ids_L=ids_L), qwen)


def test_features_without_token_name_their_sample(batch: PackedBatch, qwen: QwenConfig) -> None:
    ids_L = batch.token_ids_L.clone()
    ids_L[batch.media_rows_M[0]] = 5
    with pytest.raises(ValueError, match="sample first: 1 features have no media token"):
        check_media(replace(batch, token_ids_L=ids_L), qwen)


def test_a_sequence_without_rows_names_nobody_elses_sample(batch: PackedBatch, qwen: QwenConfig) -> None:
    """Its rows start where the next sample's do."""
    ids_L = batch.token_ids_L.clone()
    ids_L[batch.media_rows_M[0]] = 5
    empty = replace(
        batch,
        token_ids_L=ids_L,
        sequences=(SequenceRef("empty", 0), *batch.sequences),
        cu_rows=torch.cat([batch.cu_rows[:1], batch.cu_rows]),
    )
    with pytest.raises(ValueError, match="sample first: 1 features"):
        check_media(empty, qwen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": ((1, 4, 6), (3, 4, 4))}, "more features than media tokens"),
        ({"grids": ((1, 4, 6),)}, "media tokens without features"),
        ({"patches_P": None}, "0 patches but grids of 56"),
        ({"patches_P": torch.zeros(60, 1176)}, "60 patches but grids of 56"),
    ],
)
def test_grids_and_patches_that_disagree_name_the_samples(
    batch: PackedBatch, qwen: QwenConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"samples first, second: {message}"):
        check_media(replace(batch, **change), qwen)


def test_embeddings_of_the_wrong_number_are_refused(batch: PackedBatch, qwen: QwenConfig) -> None:
    with pytest.raises(ValueError, match="13 media embeddings for 14 media tokens"):
        check_media(batch, qwen, embeddings=13)
