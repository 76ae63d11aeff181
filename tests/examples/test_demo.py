"""The demo's way from random weights to a report, small: real files, torchrun, two ranks that share each layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dppo_mcore.report.overview import phases
from dppo_mcore.report.page import write
from dppo_mcore.report.read import open_run, read_metrics
from examples.tabletop import demo
from examples.tabletop.make_base import make_base
from examples.tabletop.make_world import WorldOptions, make_world

SMALL = {"base-sft-steps": 6, "buffer-samples": 48, "eval-samples": 24, "rl-min-steps": 2, "rl-max-steps": 2,
         "prompts-per-step": 8, "sft-max-steps": 3}  # fmt: skip


def test_a_base_whose_making_was_stopped_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    world = WorldOptions(clips_base=2, clips_pool=2, clips_eval=2, general=8, general_eval=4)

    def stopped(out: Path, size: str) -> None:
        make_base(out, size=size)
        (out / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("examples.tabletop.make_base.make_base", stopped)
        demo.prepare(tmp_path, world=world)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")  # as calls that wrote it in place have left it
    demo.prepare(tmp_path, world=world)
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "base")
    kept = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    demo.prepare(tmp_path, world=world)
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == kept
    assert not (tmp_path / "base.unfinished").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_loops_on_two_ranks(tmp_path: Path, tensor_parallel: int) -> None:
    world, run = tmp_path / "world", tmp_path / "run"
    make_world(world, WorldOptions(clips_base=30, clips_pool=30, clips_eval=10, general=40, general_eval=10), workers=1)
    model = make_base(tmp_path / "base")
    files = {"data": "pool", "general-data": "general", "base-data": "base", "eval-data": "eval",
             "eval-general-data": "eval_general", "teacher-file": "teacher"}  # fmt: skip
    flags = {**SMALL, **{option: world / f"{name}.jsonl" for option, name in files.items()}, "model": model,
             "tensor-model-parallel-size": tensor_parallel}  # fmt: skip
    assert demo.train(run, 2, [part for name, value in flags.items() for part in (f"--{name}", str(value))]) == 0
    opened = open_run(run)
    found = phases(opened)
    assert all(phase["state"] == "done" for phase in found) and {"base-sft", "buffer", "rl", "weakness", "sft"} == {
        phase["kind"] for phase in found
    }
    assert [phase["horizon"] for phase in found if phase["kind"] == "rl"] == [32.0, 64.0]
    sources = {source for (source,) in opened.rows("SELECT DISTINCT source FROM sft_items")}
    assert "weak" in sources and "general" in sources
    opened.close()
    shown = demo.table(run)
    assert "2-1 RL" in shown and "planning" in shown.splitlines()[0]
    assert any("rl/reward" in row for row in read_metrics(run))
    page = write(run).read_text()
    assert json.dumps("2-1 RL") in page
