"""The dry run: every key of a large checkpoint once, without its memory, and mistakes named."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import plan
import pytest
import torch

from dppo_mcore.config import ParallelConfig
from dppo_mcore.model.config import parse_qwen_config
from dppo_mcore.model.weight_map import WeightMap
from dppo_mcore.runtime.errors import UserError

TOOL = Path(plan.__file__)


def run(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), "--dry-run", "--json", *arguments],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", [("8", "4", None), ("4", "8", "2")])
def test_72b_fits_without_its_memory(layout: tuple[str, str, str | None]) -> None:
    tp, pp, vpp = layout
    found = run("--model-config", "72b", "--tp", tp, "--pp", pp, *(["--vpp", vpp] if vpp else []))
    assert found["ranks"] == 32 and found["keys"] == 1353
    assert found["peak_mib"] < 6 * 1024
    # 73.4 B parameters in all, the vision tower and norms on every tensor rank.
    assert 73.4e9 < sum(found["parameters_per_rank"]) * int(tp) < 1.12 * 73.4e9


@pytest.mark.parametrize(
    ("size", "layout", "keys"),
    [
        ("3b", {"tp": 2, "pp": 4, "first": 6, "last": 10}, 824),
        ("7b", {"tp": 4, "pp": 2}, 729),
        ("32b", {"tp": 8, "pp": 4, "vpp": 2}, 1161),
    ],
)
def test_other_sizes_tied_uneven_and_interleaved(size: str, layout: dict[str, int], keys: int) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=layout.get("vpp"),
        num_layers_in_first_pipeline_stage=layout.get("first"),
        num_layers_in_last_pipeline_stage=layout.get("last"),
    )
    assert plan.dry_run(plan.qwen_of(size), parallel)["keys"] == keys


@pytest.mark.slow
@pytest.mark.parametrize("size", plan.TEXT_SIZES)
def test_every_size_in_every_layout(size: str) -> None:
    """Each key exactly once, or one line that names the flag."""
    qwen = plan.qwen_of(size)
    keys = len(WeightMap(qwen).hf_shapes())
    for tp, pp, vpp in itertools.product((1, 2, 4), (1, 2, 4), (None, 2)):
        layout = ParallelConfig(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp
        )
        message = None
        if qwen.num_kv_heads % tp:
            message = f"--tensor-model-parallel-size {tp} does not divide the model's {qwen.num_kv_heads} KV heads"
        elif vpp and pp == 1:
            message = "--virtual-pipeline-model-parallel-size needs --pipeline-model-parallel-size > 1"
        elif vpp and qwen.num_layers // pp % vpp:
            message = f"--virtual-pipeline-model-parallel-size {vpp} does not divide the layers per stage"
        if message is None:
            assert plan.dry_run(qwen, layout)["keys"] == keys
        else:
            with pytest.raises(UserError) as refused:
                plan.dry_run(qwen, layout)
            assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_layout_that_does_not_divide_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), "--dry-run", "--model-config", "7b", "--tp", "8"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert lines == ["error: --tensor-model-parallel-size 8 does not divide the model's 4 KV heads"]
    assert plan.qwen_of("7B").hidden_size == 3584
    with pytest.raises(UserError, match="--model-config nowhere"):
        plan.qwen_of("nowhere")


def test_coverage_errors_name_the_key() -> None:
    plan._check_coverage("good", 8, False, [(0, 0, 0, 4), (0, 1, 4, 4)], 2)
    plan._check_coverage("norm", 8, True, [(1, 0, 0, 8), (1, 1, 0, 8)], 2)
    for takers in ([(0, 0, 0, 4)], [(0, 0, 0, 4), (0, 1, 3, 5)], [(0, 0, 0, 4), (0, 1, 5, 3)]):
        with pytest.raises(UserError, match="bad of 8 .* not covered exactly once"):
            plan._check_coverage("bad", 8, False, takers, 2)
    for takers in ([], [(0, 0, 0, 8), (1, 0, 0, 8)]):
        with pytest.raises(UserError, match="twice lies on"):
            plan._check_coverage("twice", 8, True, takers, 1)


def test_released_sizes_parse() -> None:
    for size in plan.TEXT_SIZES:
        qwen = parse_qwen_config(plan.released_config(size))
        assert qwen.head_dim == 128 and torch.Size((qwen.vocab_size,)).numel() > 150_000
        assert replace(qwen, num_layers=1).vision.depth == 32
