"""Checkpoints: bitwise resume, atomic publication, pruning, other layouts."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_mcore.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from dppo_mcore.learn import checkpoint
from dppo_mcore.learn.checkpoint import Saver
from dppo_mcore.learn.loss import CrossEntropy
from dppo_mcore.learn.state import Learner, build
from dppo_mcore.learn.step import train_step
from dppo_mcore.model.weights import iter_hf_weights
from dppo_mcore.runtime import parallel
from dppo_mcore.runtime.errors import UserError
from tests.learn.batches import random_questions
from tests.learn.exact import cut
from tests.support.rank_pool import RankPool

TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
DP2 = ParallelConfig()
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)


def make(model: str, layout: ParallelConfig, optimizer: str, dtype: str = "fp32", seed: int = 0) -> Learner:
    parallel.reinit(layout, seed=seed)
    options = OptimizerConfig(optimizer=optimizer, lr_schedule="cosine", weight_decay=0.01)
    state = build(
        Config(run=RunConfig(model=model), parallel=layout, model=ModelConfig(dtype=dtype), optimizer=options)
    )
    state.begin_phase("sft", 1e-3, 8)
    return state


def advance(state: Learner, first: int, count: int) -> list[float]:
    """Losses of some steps, each on a batch of its own."""
    losses = []
    for step in range(first, first + count):
        questions = random_questions(state.qwen, 4, 2, seed=step)
        losses.append(train_step(state, cut(questions, "packed", state), CrossEntropy()).loss)
    return losses


def final(state: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in iter_hf_weights(state.models, state.qwen)}


def train_and_save(model: str, layout: ParallelConfig, optimizer: str, folder: str, dtype: str = "fp32"):
    """Two steps, a checkpoint, two more: their losses and the last weights."""
    # The pool's ranks are daemons, which multiprocessing forbids the writer processes that a checkpoint needs.
    multiprocessing.current_process()._config["daemon"] = False
    state = make(model, layout, optimizer, dtype)
    advance(state, 0, 2)
    Saver(Path(folder), background=False).save(state, 2, {"note": [1, 2]})
    return advance(state, 2, 2), final(state), state.progress


def load_and_train(model: str, layout: ParallelConfig, optimizer: str, folder: str, dtype: str = "fp32"):
    """The same from the checkpoint on, in a learner that has gone elsewhere before."""
    state = make(model, layout, optimizer, dtype, seed=5)
    advance(state, 90, 1)
    extra = checkpoint.load(state, Path(folder))
    assert extra == {"note": [1, 2]}
    return advance(state, 2, 2), final(state), state.progress


def check(first, second, exact: bool) -> None:
    (losses, weights, progress), (resumed, reloaded, counted) = first, second
    assert counted == progress
    if exact:
        assert losses == resumed
        assert all(torch.equal(weights[name], reloaded[name]) for name in weights)
    else:
        assert resumed == pytest.approx(losses, abs=2e-5)
        worst = max(float((weights[name] - reloaded[name]).abs().max()) for name in weights)
        assert worst < 2e-4


@pytest.fixture
def world() -> Iterator[None]:
    parallel.start(ParallelConfig(), seed=0)
    yield
    parallel.stop()


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_is_bitwise(optimizer: str, dtype: str, tiny_dir: str, tmp_path: Path) -> None:
    first = train_and_save(tiny_dir, DP2, optimizer, str(tmp_path), dtype)
    check(first, load_and_train(tiny_dir, DP2, optimizer, str(tmp_path), dtype), exact=True)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_every_layout_resumes_and_loads_the_others(
    optimizer: str, tiny_dir: str, tmp_path: Path, pool2: RankPool
) -> None:
    """Bitwise on the layout that wrote it; to rounding on every other, optimizer state included."""
    layouts = {"dp2": DP2, "tp2": TP2, "pp2": PP2}
    written = {}
    for name, layout in layouts.items():
        folder = str(tmp_path / name)
        written[name] = pool2.run(train_and_save, tiny_dir, layout, optimizer, folder)[0]
        check(written[name], pool2.run(load_and_train, tiny_dir, layout, optimizer, folder)[0], exact=True)
    for source, target in (("dp2", "tp2"), ("tp2", "pp2"), ("pp2", "dp2")):
        loaded = pool2.run(load_and_train, tiny_dir, layouts[target], optimizer, str(tmp_path / source))[0]
        check(written[source], loaded, exact=False)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("optimizer", ["adam", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_checkpoint_of_tp2_pp2_goes_on_under_other_layouts(
    optimizer: str, tiny_dir: str, tmp_path: Path, pool2: RankPool, pool4: RankPool
) -> None:
    """The steps after loading, not only the loss right after it."""
    source = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    written = pool4.run(train_and_save, tiny_dir, source, optimizer, str(tmp_path))[0]
    alone = load_and_train(tiny_dir, ParallelConfig(), optimizer, str(tmp_path))
    others = [pool2.run(load_and_train, tiny_dir, layout, optimizer, str(tmp_path))[0] for layout in (TP2, PP2)]
    others.append(pool4.run(load_and_train, tiny_dir, TP2, optimizer, str(tmp_path))[0])
    for found in (alone, *others):
        check(written, found, exact=False)
        assert found[0][0] == pytest.approx(written[0][0], abs=1e-6)


@pytest.mark.usefixtures("world")
def test_a_resumed_optimizer_goes_by_the_present_options(tiny_dir: str, tmp_path: Path) -> None:
    """A checkpoint has Megatron's groups in it, decay, betas and epsilon with them; flags changed since then count."""
    Saver(tmp_path, background=False).save(make(tiny_dir, DP2, "adam"), 1, {})
    changed = OptimizerConfig(weight_decay=0.3, adam_beta1=0.7, adam_beta2=0.8, adam_eps=1e-3)
    state = build(Config(run=RunConfig(model=tiny_dir), model=ModelConfig(dtype="fp32"), optimizer=changed))
    checkpoint.load(state, tmp_path)
    advance(state, 0, 1)
    groups = state.optimizer.inner.param_groups
    assert {(group["weight_decay"], *group["betas"], group["eps"]) for group in groups} == {
        (0.3, 0.7, 0.8, 1e-3),
        (0.0, 0.7, 0.8, 1e-3),
    }


@pytest.mark.usefixtures("world")
def test_latest_keep_and_best(tiny_dir: str, tmp_path: Path) -> None:
    state = make(tiny_dir, DP2, "adam")
    saver = Saver(tmp_path, keep=2, background=True)
    for step, score in enumerate([0.1, 0.9, 0.3, 0.2, None], 1):
        saver.save(state, step, {}, score)
        saver.poll()
    saver.finish()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]
    assert checkpoint.latest(tmp_path).name == "step-00000005"
    assert checkpoint.best(tmp_path).name == "step-00000002"
    assert not list(tmp_path.glob(".*part*"))


@pytest.mark.usefixtures("world")
def test_a_partial_checkpoint_is_never_loaded(tiny_dir: str, tmp_path: Path) -> None:
    state = make(tiny_dir, DP2, "adam")
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load(state, tmp_path)
    Saver(tmp_path, background=False).save(state, 1, {})
    half = tmp_path / ".step-00000002.part"
    half.mkdir()
    (half / checkpoint.META).write_text(json.dumps({"step": 2}))
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    checkpoint.load(state, tmp_path)


@pytest.mark.usefixtures("world")
def test_what_killed_writers_leave_is_swept_and_not_used(tiny_dir: str, tmp_path: Path) -> None:
    """A writer may outlive its killed run: the resumed one, saving the same step, shares no file with it."""
    state = make(tiny_dir, DP2, "adam")
    orphan = tmp_path / ".step-00000001.0000dead.part"
    orphan.mkdir()
    (orphan / "written-by-0").write_bytes(b"a message of the killed run's writer")
    saver = Saver(tmp_path, background=True)
    saver.save(state, 1, {})
    [own] = tmp_path.glob(".*.part")
    assert own.name.startswith(".step-00000001.") and own != orphan
    orphan.mkdir()
    (orphan / "__0_0.distcp").write_bytes(b"written late")
    saver.finish()
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    checkpoint.load(state, tmp_path)
    saver.save(state, 2, {})
    assert not orphan.exists()
    saver.finish()


@pytest.mark.usefixtures("world")
def test_a_removed_checkpoint_is_never_half_there(tiny_dir: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A kill while an old checkpoint is deleted leaves nothing under a plain name."""
    state = make(tiny_dir, DP2, "adam")
    saver = Saver(tmp_path, keep=1, background=False)
    saver.save(state, 1, {})
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def half(path: Path, **options: Any) -> None:
        seen.append([found.name for found in checkpoint.checkpoints(tmp_path)])
        remove(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", half)
    saver.save(state, 2, {})
    assert seen == [["step-00000002"]]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    background: bool, tiny_dir: str, tmp_path: Path
) -> None:
    state = make(tiny_dir, DP2, "adam")
    saver = Saver(tmp_path, background=background)
    saver.save(state, 1, {"step": 1})
    saver.finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="rank 0.* MiB are free there; the newest .* is step-00000001"):
            saver.save(state, 2, {"step": 2})
            saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert checkpoint.load(state, tmp_path) == {"step": 1}
    Saver(tmp_path, background=background).save(state, 2, {"step": 2})


@pytest.mark.usefixtures("world")
def test_weights_only_load_keeps_counters(tiny_dir: str, tmp_path: Path) -> None:
    state = make(tiny_dir, DP2, "adam")
    advance(state, 0, 2)
    expected = final(state)
    Saver(tmp_path, background=False).save(state, 2, {"loop": 1})
    other = make(tiny_dir, DP2, "muon")
    assert checkpoint.load(other, tmp_path, weights_only=True) == {"loop": 1}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final(other).items())
    assert other.progress.total_steps == 0
