"""Plans are made from metadata alone: bounded buckets, one owner, the cheaper route, the same on every rank."""

from __future__ import annotations

import pytest

from dppo_mcore.model.config import QwenConfig, load_qwen_config
from dppo_mcore.model.weight_map import WeightMap
from dppo_mcore.rollout.base import SyncError
from dppo_mcore.sync.plan import Owner, RankPlace, SyncPlan, make_plan


@pytest.fixture(scope="module")
def qwen(tiny_dir: str) -> QwenConfig:
    """The tiny architecture."""
    return load_qwen_config(tiny_dir)


def plan(qwen: QwenConfig, bucket: int, hosts: tuple[str, ...] = ("a", "a"), tp: int = 2, **options: bool) -> SyncPlan:
    """Two stages, the layers split between them; stage s on hosts[s]."""
    entries = list(WeightMap(qwen).exported())
    half = qwen.num_layers // 2

    def stage(entry: object) -> int:
        layer = entry.layer  # type: ignore[attr-defined]
        if layer is not None:
            return int(layer >= half)
        return int("final_layernorm" in entry.name or "output_layer" in entry.name)  # type: ignore[attr-defined]

    owners = {e.name: Owner(stage(e), "bfloat16", not e.name.startswith("vision.")) for e in entries}
    places = [RankPlace(s, t, hosts[s]) for s in range(2) for t in range(tp)]
    options = {"vision": False} | options
    return make_plan(entries, owners, places, bucket, 64, **options)


def test_every_tensor_once_and_buckets_within_bounds(qwen: QwenConfig) -> None:
    """Only a single entry larger than the limit exceeds it."""
    expected = {name for name in WeightMap(qwen).hf_shapes() if not name.startswith("visual.")}
    for bucket_bytes in (1, 4 << 10, 64 << 10, 1 << 30):
        made = plan(qwen, bucket_bytes)
        names = [slot.name for bucket in made.buckets for slot in bucket.slots]
        assert sorted(names) == sorted(expected)
        assert all(bucket.nbytes <= bucket_bytes or len(bucket.items) == 1 for bucket in made.buckets)
        for bucket in made.buckets:
            ends = [0] + [slot.start + slot.nbytes for slot in bucket.slots]
            assert all(slot.start >= end for slot, end in zip(bucket.slots, ends, strict=False))
            assert ends[-1] <= bucket.nbytes


def test_the_tower_travels_only_where_wanted(qwen: QwenConfig) -> None:
    """And not again while it is frozen."""
    assert not any(name.startswith("visual.") for name in plan(qwen, 1 << 20).shapes)
    assert any(name.startswith("visual.") for name in plan(qwen, 1 << 20, vision=True).shapes)
    again = plan(qwen, 1 << 20, vision=True, learning_only=True)
    assert not any(name.startswith("visual.") for name in again.shapes)


def test_another_node_forwards_its_shards(qwen: QwenConfig) -> None:
    """A tensor-parallel share of the bytes per link, where gathering first would carry them all."""
    near, far = plan(qwen, 1 << 20), plan(qwen, 1 << 20, ("a", "b"))
    assert near.link_bytes() == {"shards first": 0, "gather first": 0}
    bytes_by_route = far.link_bytes()
    assert bytes_by_route["shards first"] * 2 == bytes_by_route["gather first"] > 0
    assert {item.route for b in far.buckets for item in b.items if item.stage == 1} == {"forward"}


def test_a_split_first_stage_is_refused(qwen: QwenConfig) -> None:
    """The leader's buffer must be in reach of its tensor-parallel peers."""
    entries = list(WeightMap(qwen).exported())
    owners = {e.name: Owner(0, "bfloat16", True) for e in entries}
    with pytest.raises(SyncError, match="tensor_model_parallel_size"):
        make_plan(entries, owners, [RankPlace(0, 0, "a"), RankPlace(0, 1, "b")], 1, 64, vision=False)


def test_equal_inputs_give_equal_digests(qwen: QwenConfig) -> None:
    """And any difference another one."""
    assert plan(qwen, 1 << 20).digest() == plan(qwen, 1 << 20).digest()
    assert plan(qwen, 1 << 20).digest() != plan(qwen, 1 << 19).digest()
    assert plan(qwen, 1 << 20).digest() != plan(qwen, 1 << 20, ("a", "b")).digest()
