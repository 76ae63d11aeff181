"""Configuration: flags beat the file, round trip, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dppo_mcore import config_checks, config_loading
from dppo_mcore.config import Config
from dppo_mcore.config_loading import ConfigError, load, override, to_yaml
from dppo_mcore.runtime.errors import SAYING_S

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"model_type": "qwen2_5_vl", "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 8,
         "intermediate_size": 256, "hidden_size": 128, "vocab_size": 1024}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that the checks accept as a checkpoint."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "text_config": SIZES}))
    (tmp_path / "pool.jsonl").write_text("")
    return directory


def parse(model: Path, world: int, *flags: str) -> None:
    """Load and check as the trainer does."""
    base = ["--model", str(model), "--data", str(model.parent / "pool.jsonl"), "--run", str(model.parent / "run")]
    config_checks.check(load([*base, *flags], prog="train"), world)


def test_a_right_configuration_passes(model: Path) -> None:
    parse(model, 8, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel")


def test_truncated_sampling_passes_where_log_probs_are_of_the_whole_softmax_or_unused(model: Path) -> None:
    truncated = ["--top-p", "0.9", "--top-k", "40"]
    parse(model, 1, *truncated)
    for use in (["--tis-cap", "2"], ["--old-logprobs", "engine"]):
        parse(model, 1, *truncated, *use, "--rollout-engine", "sglang", "--rollout-url", "http://127.0.0.1:1")


# world size, flags, the field that the one line must begin with
WRONG: list[tuple[int, list[str], str]] = [
    (1, ["--tensor-model-parallel-size", "2"], "tensor_model_parallel_size"),
    (6, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"], "tensor_model_parallel_size"),
    (8, ["--tensor-model-parallel-size", "8"], "tensor_model_parallel_size"),
    (3, ["--tensor-model-parallel-size", "3"], "tensor_model_parallel_size"),
    (3, ["--pipeline-model-parallel-size", "3"], "pipeline_model_parallel_size"),
    (4, ["--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "3"],
     "virtual_pipeline_model_parallel_size"),
    (1, ["--virtual-pipeline-model-parallel-size", "2"], "virtual_pipeline_model_parallel_size"),
    (2, ["--context-parallel-size", "2"], "context_parallel_size"),
    (1, ["--sequence-parallel"], "sequence_parallel"),
    (2, ["--pipeline-model-parallel-size", "2", "--num-layers-in-first-pipeline-stage", "0"],
     "num_layers_in_first_pipeline_stage"),
    (1, ["--tensor-model-paralel-size", "2"], "--tensor-model-paralel-size"),
    (1, ["--seed", "x"], "--seed"),
    (1, ["--mode", "ppo"], "--mode"),
    (1, ["--optimizer", "sgd"], "--optimizer"),
    (1, ["--freeze-vision", "maybe"], "--freeze-vision"),
    (1, ["--model", "/does/not/exist"], "model"),
    (1, ["--data", "/does/not/exist.jsonl"], "data"),
    (1, ["--teacher-file", "/does/not/exist.jsonl"], "teacher_file"),
    (1, ["--run", "/dev/null"], "run"),
    (1, ["--temperature", "0"], "temperature"),
    (1, ["--top-p", "1.5"], "top_p"),
    (1, ["--group-size", "1"], "group_size"),
    (1, ["--attention-backend", "flash"], "attention_backend"),
    (8, ["--global-batch-size", "4"], "global_batch_size"),
    (8, ["--prompts-per-step", "4"], "prompts_per_step"),
    (1, ["--updates-per-batch", "5"], "updates_per_batch"),
    (1, ["--mix-weak", "0.9"], "mix_weak"),
    (1, ["--max-frames", "7"], "max_frames"),
    (1, ["--dual-clip", "0.5"], "dual_clip"),
    (1, ["--horizons", "32", "-1"], "horizons"),
    (1, ["--max-tokens-per-micro-batch", "100"], "max_tokens_per_micro_batch"),
    (1, ["--rl-min-steps", "900"], "rl_min_steps"),
    (1, ["--teacher-url", "ftp://x"], "teacher_url"),
    (1, ["--rollout-url", "http://127.0.0.1:1"], "rollout_url"),
    (1, ["--base-sft-steps", "5"], "base_data"),
    (1, ["--rollout-placement", "disjoint"], "rollout_placement"),
    (1, ["--rollout-placement", "disjoint", "--rollout-engine", "sglang", "--rollout-python", sys.executable],
     "rollout_placement"),
    (1, ["--rollout-partial"], "rollout_partial"),
    (1, ["--rollout-partial", "--tis-cap", "2", "--rollout-step-tokens", "2000"], "rollout_step_tokens"),
    (1, ["--rollout-partial", "--tis-cap", "2", "--dump-rollouts", "dump"], "rollout_partial"),
    (1, ["--top-p", "0.9", "--tis-cap", "2"], "top_p"),
    (1, ["--top-k", "40", "--old-logprobs", "engine"], "top_k"),
    (1, ["--rollout-engine", "vllm", "--rollout-url", "http://x", "--top-p", "0.9", "--tis-cap", "2"], "top_p"),
    (1, ["--freeze-vision", "--freeze-merger", "--freeze-language"], "freeze_language"),
    (1, ["--config", "/does/not/exist.yaml"], "--config"),
    (1, ["--config", "/"], "--config"),
    (1, ["--data", "/"], "data"),
    (1, ["--media-root", "/dev/null"], "media_root"),
    (1, ["--load", "/dev/null"], "load"),
    (1, ["--run", "/dev/null/below"], "run"),
    (1, ["--save", "/dev/null"], "save"),
    (1, ["--save", "/proc/none"], "save"),
    (1, ["--rl-lr", "inf"], "rl_lr"),
    (1, ["--seed", "4294967296"], "seed"),
    (1, ["--adam-beta2", "1"], "adam_beta2"),
    (1, ["--overlong-penalty-tokens", "2000"], "overlong_penalty_tokens"),
    (1, ["--rollout-engine", "vllm"], "rollout_url"),
    (1, ["--rollout-engine", "sglang", "--rollout-url", "localhost:30000"], "rollout_url"),
    (1, ["--rollout-engine", "sglang"], "rollout_python"),
    (1, ["--rollout-python", "/does/not/exist"], "rollout_python"),
    (1, ["--rollout-tensor-parallel-size", "3"], "rollout_tensor_parallel_size"),
    (1, ["--engine-options", "max_running_requests"], "engine_options"),
    (1, ["--best-metric", "eval/sucess"], "best_metric"),
    (1, ["--wandb", "project"], "wandb"),
]  # fmt: skip


@pytest.mark.parametrize(("world", "flags", "field"), WRONG, ids=[f"{row[2]}-{i}" for i, row in enumerate(WRONG)])
def test_a_wrong_configuration_gives_one_line_that_names_the_field(
    model: Path, world: int, flags: list[str], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(model, world, *flags)
    message = str(caught.value)
    assert message.startswith(field), message
    assert "\n" not in message and len(message) < 250


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("not JSON", "not readable JSON"),
        ("[]", "only qwen2_5_vl is supported"),
        ('{"model_type": "llama"}', "only qwen2_5_vl is supported"),
        ('{"model_type": "qwen2_5_vl"}', "has no number num_attention_heads"),
    ],
)
def test_a_wrong_checkpoint_is_named(model: Path, content: str, part: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"^model: .*config.json.*{part}"):
        parse(model, 1)


def test_every_number_has_a_range() -> None:
    ranged = {*config_checks.POSITIVE, *config_checks.NOT_NEGATIVE, *config_checks.SHARES, *config_checks.MAY_BE_NONE}
    numbers = {
        field.name
        for section in vars(Config()).values()
        for field in dataclasses.fields(section)
        if {"int", "float"} & set(str(field.type).replace("|", " ").split())
    }
    assert numbers <= ranged, sorted(numbers - ranged)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("seed: [1, 2]", "seed: [1, 2] is not of type int"),
        ("seed: null", "seed: None is not of type int"),
        ("seed: 1.5", "seed: invalid literal"),
        ("seed: 1\nseed: 2", "line 2: seed: given twice"),
        ("rl: [1]", "rl: a section of options is needed"),
        ("stop: [--x]", "stop: '--x' reads as a flag"),
        ("tensor_model_paralel_size: 2", "did you mean tensor_model_parallel_size?"),
        ("seed: [1", "line"),
        ("- 1", "mapping"),
        ("seed: true", "seed: True is not of type int"),
        ("freeze_vision: 3", "freeze_vision: 3 is not of type bool"),
        ("parallel: {seed: 1}\nseed: 2", "given twice"),
        ("seed: {a: 1}", "seed"),
    ],
)
def test_a_wrong_file_gives_one_line_that_names_file_and_key(tmp_path: Path, content: str, part: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(["--config", str(file)], prog="train")
    assert str(file) in str(caught.value) and part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_binary_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(["--config", str(file)], prog="train")


def test_a_flag_beats_the_file_and_the_resolved_file_gives_the_same(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "seed: 5\nparallel:\n  sequence-parallel: true\nhorizons: [8, 16]\ntis_cap: null\nstop: ['</answer>']\n"
    )
    config = load(["--config", str(file), "--seed", "7"], prog="train")
    assert (config.run.seed, config.parallel.sequence_parallel, config.practice.horizons) == (7, True, (8.0, 16.0))
    assert config.rollout.stop == ("</answer>",)
    again = tmp_path / "b.yaml"
    config = override(config, media_root="--odd name", stop=("", "a b"))
    again.write_text(to_yaml(config))
    assert load(["--config", str(again)], prog="train") == config
    assert load(["--run-folder", "x"], prog="train").run.run == load(["--run-folder=x"], prog="train").run.run == "x"
    assert override(config, seed=1, rl_lr=1.0).rl.rl_lr == 1.0


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing heavy can be imported."""
    for name in ("torch", "megatron", "nvidia", "sglang", "transformers", "triton", "av"):
        (tmp_path / "bare" / name).mkdir(parents=True)
        (tmp_path / "bare" / name / "__init__.py").write_text("raise ImportError('must not be imported')")
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'bare'}{os.pathsep}{ROOT}"}


def test_help_needs_no_heavy_package_and_is_quick(bare: dict[str, str]) -> None:
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "dppo_mcore.train", "--help"], env=bare, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "--tensor-model-parallel-size" in ended.stdout
    assert time.monotonic() - began < 20  # the bar of 2 s is measured on a quiet machine, not asserted


@pytest.mark.parametrize(
    ("module", "rest"),
    [("train", []), ("evaluate", ["--out", "x"]), ("score", ["--out", "x"]), ("export", ["--out", "x", "--load", "."])],
)
def test_a_wrong_layout_ends_every_command_before_any_process_group(
    bare: dict[str, str], model: Path, module: str, rest: list[str]
) -> None:
    flags = ["--model", str(model), "--data", str(model.parent / "pool.jsonl"), "--tensor-model-parallel-size", "2"]
    command = [sys.executable, "-m", f"dppo_mcore.{module}", *flags, *rest]
    ended = subprocess.run(command, env=bare | {"WORLD_SIZE": "1"}, capture_output=True, text=True, cwd=model.parent)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: tensor_model_parallel_size: 2 ") and ended.stderr.count("\n") == 1


def test_one_rank_of_a_node_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """torchrun ends the others while they wait; one that fails alone speaks after all."""
    waited: list[float] = []
    monkeypatch.setattr(config_loading.time, "sleep", waited.append)
    for rank, waits in (("0", []), ("1", [SAYING_S])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ending:
            config_loading.fail(ConfigError("data: x"))
        assert ending.value.code == 2 and capsys.readouterr().err == "error: data: x\n"
        assert waited == waits


def test_importing_the_package_opens_no_cuda_context() -> None:
    code = "import dppo_mcore, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("name", "world"), [("qwen7b-1node", 8), ("qwen72b-8nodes", 64), ("qwen72b-32nodes", 256)])
def test_the_cluster_examples_ask_for_nothing_refused(name: str, world: int) -> None:
    """Their paths are the user's; everything else must pass the trainer's own checks."""
    config = load(["--config", str(ROOT / "examples" / f"{name}.yaml")], prog="train")
    config_checks._check_ranges(
        {key: value for section in vars(config).values() for key, value in vars(section).items()}
    )
    config_checks._check_layout(config, world)
    config_checks._check_training(config, world)
    config_checks._check_training(override(config, rollout_partial=True, tis_cap=2.0), world)
    with pytest.raises(ConfigError, match="rollout_partial"):
        config_checks._check_training(override(config, rollout_partial=True, tis_cap=None), world)
