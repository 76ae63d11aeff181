"""Hugging Face -> shards -> Hugging Face, bit for bit, in every layout; exports that transformers loads; errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_mcore.config import ParallelConfig
from dppo_mcore.model.config import check_layout, load_qwen_config
from dppo_mcore.model.safetensors_io import CheckpointError, CheckpointReader, TensorSpec, plan_files, write_checkpoint
from dppo_mcore.model.weight_map import WeightError, WeightMap
from dppo_mcore.model.weights import copy_side_files
from tests.model import weights_cases as cases


def layout(tp: int = 1, pp: int = 1, vpp: int | None = None, **more: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **more,
    )


FOUR_RANKS = [
    layout(1, 4, 2),
    layout(4, 1),
    layout(2, 2, sequence_parallel=True),
    layout(1, 4, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=1),
]


def name_of(parallel: ParallelConfig) -> str:
    parts = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        parallel.num_layers_in_first_pipeline_stage,
    )
    return "tp{}-pp{}-vpp{}-first{}".format(*parts)


@pytest.fixture(scope="module")
def bf16_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    import make_tiny

    return str(make_tiny.make(tmp_path_factory.mktemp("bf16") / "model", tied=True, dtype="bfloat16"))


@pytest.mark.parametrize("parallel", FOUR_RANKS, ids=name_of)
def test_round_trip_is_bit_exact(
    pool4: Any, tiny_dir: str, tiny_tied_dir: str, tiny_odd_dir: str, bf16_dir: str, parallel: Any
) -> None:
    checkpoints = [(tiny_dir, "fp32"), (tiny_tied_dir, "fp32"), (tiny_odd_dir, "fp32"), (bf16_dir, "bf16")]
    for folder, dtype in checkpoints:
        expected = cases.folder_digests(folder)
        for found, requested, own in pool4.run(cases.round_trip, folder, parallel, dtype):
            assert found == expected
            assert requested == own


def test_round_trip_on_one_rank(single_rank: None, tiny_dir: str) -> None:
    found, requested, own = cases.round_trip(tiny_dir, layout())
    assert found == cases.folder_digests(tiny_dir)
    assert requested == own


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_layout_loads_every_rank_bit_exactly(tiny_dir: str, bf16_dir: str, tp: int, pp: int) -> None:
    """One process plays each rank in turn (a load needs no collectives); the shards merge to the checkpoint."""
    for vpp in (None, 2) if pp > 1 else (None,):
        for folder, dtype in ((tiny_dir, "fp32"), (bf16_dir, "bf16")):
            assert cases.merged_loads(folder, layout(tp, pp, vpp), dtype) == cases.folder_digests(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "vpp"), [(2, 4, 2), (4, 2, None)])
def test_round_trip_on_many_ranks(tiny_dir: str, tiny_tied_dir: str, tp: int, pp: int, vpp: int | None) -> None:
    """Eight real ranks."""
    from tests.support.rank_pool import RankPool

    pool = RankPool(tp * pp)
    try:
        for folder in (tiny_dir, tiny_tied_dir):
            expected = cases.folder_digests(folder)
            for found, requested, own in pool.run(cases.round_trip, folder, layout(tp, pp, vpp)):
                assert found == expected and requested == own
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (layout(8, 1), "--tensor-model-parallel-size 8 does not divide the model's 4 KV heads"),
        (layout(1, 3), "--pipeline-model-parallel-size 3: 8 layers do not divide over 3 stages"),
        (layout(1, 1, 2), "--virtual-pipeline-model-parallel-size needs --pipeline-model-parallel-size > 1"),
        (layout(1, 4, 4), "--virtual-pipeline-model-parallel-size 4 does not divide the layers per stage"),
    ],
)
def test_invalid_layouts_are_refused_in_one_line(tiny_dir: str, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_layout(load_qwen_config(tiny_dir), parallel)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("tied", [False, True])
def test_export_loads_in_transformers(
    pool4: Any, tiny_dir: str, tiny_tied_dir: str, tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    source, out = tiny_tied_dir if tied else tiny_dir, tmp_path / "exported"
    pool4.run(cases.export, source, layout(2, 2), str(out), max_file_bytes=1_000_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "exported.partial").exists()
    expected = Qwen2_5_VLForConditionalGeneration.from_pretrained(source).state_dict()
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert AutoTokenizer.from_pretrained(out).encode("red block") == AutoTokenizer.from_pretrained(source).encode(
        "red block"
    )
    names = {path.name for path in Path(source).iterdir() if path.suffix != ".safetensors"}
    assert names <= {path.name for path in out.iterdir()}


def test_a_bf16_export_says_so(single_rank: None, tiny_dir: str, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    cases.export(tiny_dir, layout(), str(out), dtype="bf16")
    config = json.loads((out / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    assert {stored.dtype for stored in CheckpointReader(out).tensors.values()} == {torch.bfloat16}
    found, _, _ = cases.round_trip(str(out), layout(), "bf16")
    assert found == cases.folder_digests(out)


def test_a_config_without_a_type_gets_one(tiny_dir: str, tmp_path: Path) -> None:
    """Without one SGLang would serve it in half precision."""
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((Path(tiny_dir) / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
    )
    (tmp_path / "out").mkdir()
    copy_side_files(source, tmp_path / "out", torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_export_refuses_to_overwrite(single_rank: None, tiny_dir: str, tmp_path: Path) -> None:
    chunks, qwen, _ = cases.load(tiny_dir, layout())
    (tmp_path / "notes.txt").write_text("mine")
    for out, message in ((tmp_path, "isn't empty"), (Path(tiny_dir), "starting checkpoint itself")):
        with pytest.raises(WeightError, match=message):
            cases.export_hf(chunks, qwen, tiny_dir, out)
    with pytest.raises(WeightError, match="has no config.json"):
        cases.export_hf(chunks, qwen, tmp_path, tmp_path / "new")
    out = tmp_path / "again"
    for _ in range(2):
        cases.export_hf(chunks, qwen, tiny_dir, out, overwrite=True)
    assert cases.folder_digests(out) == cases.folder_digests(tiny_dir)


def rewritten(source: str, out: Path, rename: Any = lambda name: name, shape: Any = lambda name, shape: shape) -> Path:
    """A copy of a checkpoint with tensors renamed (None drops one) or reshaped, in several files."""
    out.mkdir()
    for path in Path(source).iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)
    reader = CheckpointReader(Path(source))
    kept = [(rename(name), reader.view(name)) for name in reader.tensors if rename(name) is not None]
    tensors = [
        (name, torch.zeros(shape(name, tuple(t.shape))) if shape(name, t.shape) != t.shape else t) for name, t in kept
    ]
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
    write_checkpoint(out, plan_files(specs, 2_000_000), iter(tensors))
    return out


def old_prefix(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def new_prefix(name: str) -> str:
    name = old_prefix(name)
    return (
        name.replace("model.", "model.language_model.")
        if name.startswith("model.")
        else name.replace("visual.", "model.visual.")
    )


@pytest.mark.parametrize("rename", [old_prefix, new_prefix])
def test_both_prefixes_load(single_rank: None, tiny_dir: str, tmp_path: Path, rename: Any) -> None:
    folder = rewritten(tiny_dir, tmp_path / "renamed", rename)
    assert any(name.startswith(rename("model.layers.0.")) for name in CheckpointReader(folder).tensors)
    found, _, _ = cases.round_trip(str(folder), layout())
    assert found == cases.folder_digests(tiny_dir)


def test_a_tied_checkpoint_may_hold_its_head_too(single_rank: None, tiny_tied_dir: str, tmp_path: Path) -> None:
    reader = CheckpointReader(Path(tiny_tied_dir))
    folder = rewritten(tiny_tied_dir, tmp_path / "copy")
    embedding = next(name for name in reader.tensors if name.endswith("embed_tokens.weight"))
    from safetensors.torch import save_file

    save_file({"lm_head.weight": reader.view(embedding).clone()}, folder / "head.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found, _, _ = cases.round_trip(str(folder), layout())
    assert found == cases.folder_digests(tiny_tied_dir)


def test_damaged_checkpoints_name_what_is_wrong(single_rank: None, tiny_dir: str, tmp_path: Path) -> None:
    def refused(folder: Path, error: type[Exception], *parts: str) -> None:
        with pytest.raises(error) as found:
            cases.load(str(folder), layout())
        assert all(part in str(found.value) for part in parts), found.value
        assert "\n" not in str(found.value)

    key = "visual.merger.mlp.2.bias"
    missing = rewritten(tiny_dir, tmp_path / "missing", lambda name: None if name.endswith(key) else name)
    refused(missing, WeightError, str(missing), f"missing key {key}")
    unknown = rewritten(
        tiny_dir, tmp_path / "unknown", lambda name: name.replace("layers.7.mlp.up", "layers.7.mlp.upp")
    )
    refused(unknown, WeightError, "unknown key", "layers.7.mlp.upp_proj.weight")
    shaped = rewritten(
        tiny_dir,
        tmp_path / "shaped",
        shape=lambda name, shape: (3, 5) if name.endswith("layers.3.mlp.down_proj.weight") else shape,
    )
    refused(shaped, WeightError, "layers.3.mlp.down_proj.weight has shape [3, 5]", "[128, 256]")

    cut = rewritten(tiny_dir, tmp_path / "cut")
    file = sorted(cut.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    refused(cut, CheckpointError, file.name, "cut short")
    file.unlink()
    refused(cut, CheckpointError, file.name, "is missing")
    for leftover in cut.glob("*.safetensors*"):
        leftover.unlink()
    refused(cut, CheckpointError, "holds no *.safetensors")


def test_readers_and_writers_agree_with_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 4),
        "c": torch.randint(0, 9, (2, 2), generator=generator),
    }
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    (tmp_path / "ours").mkdir()
    write_checkpoint(tmp_path / "ours", plan_files(specs, 1 << 30), iter(tensors.items()))
    theirs = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
    save_file(tensors, tmp_path / "theirs.safetensors")
    reader = CheckpointReader(tmp_path)
    assert all(torch.equal(reader.view(name), tensor) for name, tensor in tensors.items())
    part = reader.narrow("a", 1, 2, 3)
    assert torch.equal(part, tensors["a"][:, 2:]) and reader.bytes_requested == 36


def test_a_large_load_reads_and_holds_no_more_than_its_share(pool2: Any, tiny_dir: str, tmp_path: Path) -> None:
    """Over a gigabyte at TP 2: bytes asked for, and anonymous memory of building and loading together."""
    qwen = cases.wide_checkpoint(tmp_path / "wide", tiny_dir, hidden=2048, layers=11, vocab=16384)
    total = sum(torch.Size(shape).numel() * 2 for shape in WeightMap(qwen).hf_shapes().values())
    assert total >= 2**30
    for cost in pool2.run(cases.load_costs, str(tmp_path / "wide"), layout(2)):
        assert cost["requested"] <= 1.05 * cost["own"]
        assert cost["own"] < 0.6 * total
        assert cost["anonymous"] <= 1.25 * cost["shard"] + cost["largest"], cost
    shutil.rmtree(tmp_path / "wide")
