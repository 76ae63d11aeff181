"""`dppo_mcore.score`: rows of the contract, equal to transformers, the same under every layout; and `export`."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dppo_mcore import export as exporting
from dppo_mcore import score as scoring
from dppo_mcore.config import Config, ParallelConfig
from dppo_mcore.config_loading import ConfigError
from dppo_mcore.model.config import load_qwen_config
from dppo_mcore.model.rope import mrope_positions
from tests.data.clips import write_clip

OPTIONS = ["--min-pixels", "784", "--max-pixels", "6272", "--max-frames", "6"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, images and clips at several rates, a second turn, and a question without an answer."""
    folder = tmp_path_factory.mktemp("score")
    generator = np.random.default_rng(0)
    for number, size in enumerate([(56, 84), (90, 70)]):
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    write_clip(folder / "slow.mp4", frames=24, fps=4, size=(56, 56))
    write_clip(folder / "fast.mp4", frames=45, fps=15, size=(56, 84))
    write_clip(folder / "uneven.mp4", frames=8, size=(56, 56), times=[0, 0.2, 0.9, 1.3, 2.0, 2.1, 3.3, 4.0])

    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]

    rows: list[dict[str, Any]] = [
        {"id": "text", "messages": turns("How many blocks?", "There are 3 blocks.")},
        {"id": "image", "messages": turns("<image> Point at the cup.", "(0.4, 0.5)"), "images": ["0.png"]},
        {"id": "slow", "messages": turns("<video> What happens next?", "The arm stops."), "videos": ["slow.mp4"]},
        {
            "id": "both",
            "messages": turns("<image> and then <video> Why?", "It fell.", "And now?", "It lies on the table."),
            "images": ["1.png"],
            "videos": ["fast.mp4"],
        },
        {"id": "uneven", "messages": turns("<video> Describe it.", "A red block moves."), "videos": ["uneven.mp4"]},
        {"id": "open", "messages": turns("Was it completed?")},
        {"id": "long", "messages": turns("Say it again. " * 20, "yes")},
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(folder: str, manifest: Path, *flags: str) -> Config:
    config, _ = scoring.parse(["--model", folder, "--data", str(manifest), "--out", "x", *OPTIONS, *flags])
    return config


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tiny_dir: str, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the command line writes."""
    out = tmp_path_factory.mktemp("out") / "deep" / "rows.jsonl"
    command = [sys.executable, "-W", "ignore", "-m", "dppo_mcore.score", "--model", tiny_dir]
    command += ["--data", str(manifest), "--out", str(out), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return read(out)


def test_rows_follow_the_contract(rows: list[dict[str, Any]], manifest: Path) -> None:
    assert [row["id"] for row in rows] == ["text", "image", "slow", "both", "uneven", "open", "long"]
    for row in rows:
        assert list(row) == ["id", "token_ids", "logprobs", "loss_mask", "media"]
        assert len(row["token_ids"]) == len(row["logprobs"]) == len(row["loss_mask"])
        assert row["logprobs"][0] is None and all(value < 0 for value in row["logprobs"][1:])
        assert any(row["loss_mask"]) == (row["id"] != "open")
    kinds = {row["id"]: [list(medium) for medium in row["media"]] for row in rows}
    assert [len(media) for media in kinds.values()] == [0, 1, 1, 2, 1, 0, 0]
    medium = rows[2]["media"][0]
    assert list(medium) == ["path", "indices", "size", "grid", "seconds_per_grid"]
    assert medium["path"] == str(manifest.parent / "slow.mp4") and len(medium["indices"]) == 6
    assert medium["grid"][0] == 3 and medium["size"] == [side * 14 for side in medium["grid"][1:]]
    assert rows[1]["media"][0]["seconds_per_grid"] is None and medium["seconds_per_grid"] > 0


def oracle_logprobs(oracle: Any, prompt: Any, qwen: Any) -> torch.Tensor:
    """transformers' log-probs of all tokens but the first, in its own precision, under our positions."""
    dtype = next(oracle.parameters()).dtype
    plans = [item.plan for item in prompt.media]
    positions = mrope_positions(
        prompt.token_ids, [plan.grid for plan in plans], [plan.seconds_per_grid for plan in plans], qwen
    )
    media: dict[str, Any] = {}
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        items = [item for item in prompt.media if item.plan.kind == kind]
        if items:
            media[key] = torch.cat([item.patches for item in items]).to(dtype)
            media[f"{kind}_grid_thw"] = torch.tensor([item.plan.grid for item in items])
    ids = torch.tensor([prompt.token_ids])
    with torch.no_grad():
        logits = oracle(
            input_ids=ids, position_ids=positions.unsqueeze(1), attention_mask=torch.ones_like(ids),
            use_cache=False, **media,
        ).logits[0, :-1]  # fmt: skip
    return logits.double().log_softmax(1).gather(1, ids[0, 1:, None]).squeeze(1)


def test_logprobs_equal_transformers(rows: list[dict[str, Any]], tiny_dir: str, manifest: Path) -> None:
    """As close to transformers in double precision as transformers itself comes in single precision.

    Positions are ours; patches come from the processor, whose parity has tests of its own.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    from dppo_mcore.data.manifest import read_manifest
    from dppo_mcore.data.qwen import Processor

    config = config_of(tiny_dir, manifest)
    single = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    double = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_dir, dtype=torch.float64).eval()
    processor, qwen = Processor(tiny_dir, config.data), load_qwen_config(tiny_dir)
    ours, theirs = 0.0, 0.0
    for row, sample in zip(rows, read_manifest(manifest), strict=True):
        prompt = processor.load(scoring.plan(processor, sample))
        assert list(prompt.token_ids) == row["token_ids"]
        truth = oracle_logprobs(double, prompt, qwen)
        ours = max(ours, (torch.tensor(row["logprobs"][1:]).double() - truth).abs().max().item())
        theirs = max(theirs, (oracle_logprobs(single, prompt, qwen) - truth).abs().max().item())
    assert ours < 1.5 * theirs < 1e-5, (ours, theirs)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ],
    ids=["dp2", "tp2-sp", "pp2-vpp2"],
)
def test_every_layout_writes_the_same_rows(
    rows: list[dict[str, Any]], pool2: Any, tiny_dir: str, manifest: Path, tmp_path: Path, parallel: ParallelConfig
) -> None:
    config = replace(config_of(tiny_dir, manifest, "--max-tokens-per-micro-batch", "96"), parallel=parallel)
    # Rounds of two samples a rank and small packed rows: more than one of each.
    assert sum(pool2.run(score_in_short_rounds, config, str(tmp_path / "out.jsonl"))) == 14
    found = read(tmp_path / "out.jsonl")
    for row, expected in zip(found, rows, strict=True):
        assert row["logprobs"][1:] == pytest.approx(expected["logprobs"][1:], abs=1e-5)
        assert {**row, "logprobs": 0} == {**expected, "logprobs": 0}


def score_in_short_rounds(config: Config, out: str) -> int:
    from dppo_mcore.runtime import parallel

    parallel.reinit(config.parallel, seed=0)
    scoring.SAMPLES_PER_ROUND = 2
    return scoring.score(config, Path(out))


def test_mistakes_are_one_line(tiny_dir: str, manifest: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--model", tiny_dir, "--data", str(manifest)], "--out: a file for the rows is needed"),
        (["--model", tiny_dir, "--out", "x"], "data: a manifest is needed"),
        (["--modle", tiny_dir, "--out", "x"], "--modle: no such option, did you mean"),
    ):
        with pytest.raises(ConfigError, match=message):
            scoring.parse(arguments)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(manifest.read_text() + '{"id": "broken", "messages": []}\n')
    command = [sys.executable, "-W", "ignore", "-m", "dppo_mcore.score", "--model", tiny_dir]
    done = subprocess.run(
        [*command, "--data", str(bad), "--out", str(tmp_path / "out.jsonl"), "--media-root", str(manifest.parent)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1 and f"error: {bad}:8" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def save_checkpoint(tiny_dir: str, run: str, parallel: ParallelConfig) -> None:
    """A run folder with one checkpoint whose weights are the model's, each 0.125 larger."""
    from dppo_mcore.config_loading import override, to_yaml
    from dppo_mcore.learn import state as learn_state
    from dppo_mcore.learn.checkpoint import Saver
    from dppo_mcore.runtime import parallel as runtime

    # The pool's ranks are daemons, which multiprocessing forbids the writer processes that a checkpoint needs.
    multiprocessing.current_process()._config["daemon"] = False
    runtime.reinit(parallel, seed=0)
    config = override(replace(Config(), parallel=parallel), model=tiny_dir, run=run, dtype="fp32")
    learner = learn_state.build(config)
    for model in learner.models:
        for parameter in model.parameters():
            parameter.data.add_(0.125)
    Saver(Path(run) / "checkpoints", background=False).save(learner, 1, {})
    if torch.distributed.get_rank() == 0:
        (Path(run) / "config.yaml").write_text(to_yaml(config))


def command_of(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", f"dppo_mcore.{module}", *map(str, arguments)]


@pytest.fixture(scope="module")
def exported(pool2: Any, tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkpoint was exported to; its run is beside it."""
    out = tmp_path_factory.mktemp("trained") / "exported"
    run = out.with_name("run")
    pool2.run(save_checkpoint, tiny_dir, str(run), ParallelConfig(tensor_model_parallel_size=2))
    done = subprocess.run(
        command_of("export", "--load", run, "--out", out), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return out


def test_a_checkpoint_exports_and_scores_alike(
    pool2: Any, tiny_dir: str, exported: Path, manifest: Path, tmp_path: Path
) -> None:
    from dppo_mcore.model.safetensors_io import CheckpointReader

    run, out = exported.with_name("run"), exported
    before, after = CheckpointReader(Path(tiny_dir)), CheckpointReader(out)
    expected = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): before.view(name)
                for name in before.tensors}  # fmt: skip
    assert expected.keys() == after.tensors.keys()
    for name, tensor in expected.items():
        assert torch.equal(after.view(name), tensor + 0.125), name
    again = subprocess.run(
        command_of("export", "--load", run, "--out", out), capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 1 and "isn't empty" in again.stderr and "Traceback" not in again.stderr

    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    results = []
    for number, flags in enumerate((["--model", str(out)], ["--model", tiny_dir, "--load", str(run / "checkpoints")])):
        config, _ = scoring.parse([*flags, "--data", str(manifest), "--out", "x", *OPTIONS])
        pool2.run(score_in_short_rounds, replace(config, parallel=parallel), str(tmp_path / f"{number}.jsonl"))
        results.append(read(tmp_path / f"{number}.jsonl"))
    assert results[0] == results[1]


def test_a_checkpoint_is_evaluated_as_its_export(tiny_dir: str, exported: Path, manifest: Path, tmp_path: Path) -> None:
    """`--load` beside the run's own configuration: the trained model's answers, not those of the model it began as."""
    run, answers = exported.with_name("run"), []
    for number, flags in enumerate((["--model", exported], ["--load", run / "checkpoints"], ["--model", tiny_dir])):
        out = tmp_path / f"{number}.json"
        command = command_of("evaluate", "--config", run / "config.yaml", *flags, "--data", manifest, "--out", out)
        command += [*OPTIONS, "--max-response-tokens", "8", "--data-workers", "0", "--reward-workers", "0"]
        command += ["--tensor-model-parallel-size", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found = json.loads(out.read_text())
        answers.append([row["text"] for row in found["answers"]])
        assert found["load"] == (str(flags[1]) if flags[0] == "--load" else "")
    assert answers[0] == answers[1] != answers[2] and len(answers[0]) == 7


def test_export_needs_to_know_the_model(tmp_path: Path) -> None:
    for arguments, message in (
        (["--out", "x"], "load: a checkpoint is needed"),
        (["--load", str(tmp_path)], "--out: a folder"),
        (["--load", str(tmp_path), "--out", "x"], "name the starting checkpoint with --model"),
    ):
        with pytest.raises(ConfigError, match=message):
            exporting.parse(arguments)
