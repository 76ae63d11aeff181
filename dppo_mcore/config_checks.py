"""Everything that can be known to be wrong before a process group starts.

Each check raises `ConfigError` with one line that begins with the field's name. No torch, no Megatron.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from dppo_mcore.config import Config
from dppo_mcore.config_loading import ConfigError, fail, nearest
from dppo_mcore.runtime.metric_names import UNITS, unit_of

MIN_FREE_BYTES = 64 * 2**20
POSITIVE = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "distributed_timeout_minutes", "recompute_num_layers", "loops", "fps", "max_frames", "min_pixels", "max_pixels",
    "max_clip_pixels", "decode_ahead", "max_tokens_per_micro_batch", "rollout_tensor_parallel_size",
    "sync_bucket_mib", "rollout_max_in_flight", "rollout_timeout_s", "engine_memory_fraction", "temperature",
    "max_prompt_tokens", "max_response_tokens", "group_size", "prompts_per_step", "rl_lr", "updates_per_batch",
    "sft_lr", "sft_epochs", "global_batch_size", "base_sft_lr", "adam_eps", "max_bad_steps", "buffer_rollouts",
    "stagnation_window", "rl_max_steps", "teacher_answers", "teacher_concurrency", "reward_timeout_s",
    "log_interval", "save_interval", "keep_checkpoints", "teacher_max_tokens",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "data_workers", "rollout_retries", "top_k", "clip_low", "clip_high", "kl_coef", "overlong_penalty_tokens",
    "format_weight", "task_weight", "base_sft_steps", "base_sft_window", "weight_decay", "muon_momentum", "clip_grad",
    "lr_warmup_steps", "buffer_samples", "stagnation_min_prompts", "rl_min_steps", "teacher_budget",
    "teacher_requests_per_minute", "teacher_timeout_s", "teacher_patience_s", "teacher_temperature",
    "retrieval_neighbours", "mix_weak", "mix_retrieved", "mix_own", "mix_general", "reward_workers",
    "eval_interval", "eval_samples", "media_cache_mib", "stagnation_threshold", "rollout_step_tokens",
)  # fmt: skip
SHARES = (
    "success_threshold", "intractable_share", "anchor_share", "engine_memory_fraction", "lr_min_ratio", "top_p",
    "teacher_vote", "adam_beta1", "adam_beta2", "muon_momentum", "mix_weak", "mix_retrieved", "mix_own",
    "mix_general",
)  # fmt: skip
MAY_BE_NONE = (
    "micro_batch_size", "max_conversation_tokens", "sft_max_steps", "tis_cap", "dual_clip",
    "virtual_pipeline_model_parallel_size", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
)  # fmt: skip
"""Above 0 where they are given."""
FILES = (
    "data", "general_data", "base_data", "eval_data", "eval_general_data", "teacher_file", "prompt_template",
    "objectives",
)  # fmt: skip
FOLDERS = ("media_root", "load", "retrieval_model", "replay_rollouts")
WRITTEN = ("run", "save", "dump_rollouts")
"""Folders that are made where they are missing."""
MODEL_SIZES = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size")


def check_or_exit(config: Config, training: bool = True) -> None:
    """`check` for the ranks this process was started among; a mistake is one line and exit code 2."""
    try:
        check(config, int(os.environ.get("WORLD_SIZE", "1")), training)
    except ConfigError as error:
        fail(error)


def check(config: Config, world_size: int, training: bool = True) -> None:
    """Raise ConfigError at the first thing that can't work on `world_size` ranks."""
    values = {name: value for section in vars(config).values() for name, value in vars(section).items()}
    _check_ranges(values)
    _check_layout(config, world_size)
    _check_paths(values)
    sizes = _check_model(config)
    _check_model_layout(config, sizes)
    if training:
        _check_training(config, world_size)
        _check_engine(config, sizes)
        _check_output(config)


def _check_ranges(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: {value} is not a finite number")
    for name in POSITIVE:
        if not values[name] > 0:
            raise ConfigError(f"{name}: {values[name]} must be above 0")
    for name in NOT_NEGATIVE:
        if values[name] < 0:
            raise ConfigError(f"{name}: {values[name]} must not be negative")
    for name in SHARES:
        if not 0 <= values[name] <= 1:
            raise ConfigError(f"{name}: {values[name]} must lie between 0 and 1")
    for name in ("adam_beta1", "adam_beta2"):
        if values[name] == 1:
            raise ConfigError(f"{name}: 1 would never take a gradient in, it must be below 1")
    if values["seed"] >= 2**32:
        raise ConfigError(f"seed: {values['seed']} must be below 2**32")
    for name in MAY_BE_NONE:
        if values[name] is not None and not values[name] > 0:
            raise ConfigError(f"{name}: {values[name]} must be above 0")
    if not values["horizons"] or min(values["horizons"]) <= 0:
        raise ConfigError(f"horizons: {list(values['horizons'])} must be one or more clip lengths in seconds above 0")
    if values["min_pixels"] > values["max_pixels"]:
        raise ConfigError(f"min_pixels: {values['min_pixels']} is above max_pixels {values['max_pixels']}")
    if values["rl_min_steps"] > values["rl_max_steps"]:
        raise ConfigError(f"rl_min_steps: {values['rl_min_steps']} is above rl_max_steps {values['rl_max_steps']}")
    if values["dual_clip"] is not None and values["dual_clip"] <= 1:
        raise ConfigError(f"dual_clip: {values['dual_clip']} must be above 1")
    if values["max_frames"] % 2:
        raise ConfigError(f"max_frames: {values['max_frames']} must be even (two frames make one temporal patch)")


def _check_layout(config: Config, world_size: int) -> None:
    layout = config.parallel
    tp, pp, cp = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    if cp != 1:
        raise ConfigError(f"context_parallel_size: {cp} is not supported yet, only 1 is")
    if world_size % (tp * pp * cp):
        raise ConfigError(
            f"tensor_model_parallel_size: {tp} x pipeline_model_parallel_size {pp} x context_parallel_size {cp} "
            f"does not divide the {world_size} rank(s) started"
        )
    if layout.sequence_parallel and tp == 1:
        raise ConfigError("sequence_parallel: needs tensor_model_parallel_size above 1")
    if layout.virtual_pipeline_model_parallel_size is not None and pp == 1:
        raise ConfigError("virtual_pipeline_model_parallel_size: needs pipeline_model_parallel_size above 1")
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        layers = getattr(layout, name)
        if layers is not None and pp == 1:
            raise ConfigError(f"{name}: needs pipeline_model_parallel_size above 1")


def _check_paths(values: dict[str, Any]) -> None:
    for name in (*FILES, *FOLDERS):
        path = Path(values[name])
        if values[name] and not path.exists():
            raise ConfigError(f"{name}: {path} does not exist")
        if values[name] and path.is_dir() != (name in FOLDERS):
            kinds = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
            raise ConfigError(f"{name}: {path} is {kinds[0]}, {kinds[1]} is needed")
    if not values["model"]:
        raise ConfigError("model: a Hugging Face checkpoint directory is needed")
    for name in WRITTEN:
        if values[name] or name == "run":
            _check_writable(name, Path(values[name]))


def _check_writable(name: str, folder: Path) -> None:
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not parent.is_dir():
        raise ConfigError(f"{name}: {parent} is a file, a folder is needed")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{name}: {parent} is not writable")
    if shutil.disk_usage(parent).free < MIN_FREE_BYTES:
        raise ConfigError(f"{name}: no space left on {parent}")


def _check_model(config: Config) -> dict[str, Any]:
    """Text sizes from the checkpoint's config.json, in its newer (nested) or older (flat) form."""
    directory = Path(config.run.model)
    if not directory.is_dir():
        raise ConfigError(f"model: {directory} is not a directory")
    file = directory / "config.json"
    if not file.is_file():
        raise ConfigError(f"model: {directory} has no config.json")
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        raise ConfigError(f"model: {file} is not readable JSON") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "qwen2_5_vl":
        raise ConfigError(f"model: {file} describes {kind!r}, only qwen2_5_vl is supported")
    sizes = {**content, **content.get("text_config", {})}
    for name in MODEL_SIZES:
        if not isinstance(sizes.get(name), int):
            raise ConfigError(f"model: {file} has no number {name}")
    return sizes


def _check_model_layout(config: Config, sizes: dict[str, Any]) -> None:
    layout = config.parallel
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    vpp = layout.virtual_pipeline_model_parallel_size or 1
    for key, name in (("num_attention_heads", "attention heads"), ("num_key_value_heads", "KV heads")):
        if sizes[key] % tp:
            raise ConfigError(
                f"tensor_model_parallel_size: {tp} does not divide the model's {sizes[key]} {name} ({key})"
            )
    if sizes["intermediate_size"] % tp:
        raise ConfigError(f"tensor_model_parallel_size: {tp} does not divide intermediate_size")
    layers, stages = sizes["num_hidden_layers"], pp
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        if (count := getattr(layout, name)) is not None:
            if count % vpp:
                raise ConfigError(f"{name}: {count} layers don't divide into {vpp} virtual stages")
            layers, stages = layers - count, stages - 1
    if layers < 0 or (stages == 0 and layers) or (stages and (layers % stages or layers // stages < 1)):
        raise ConfigError(
            f"pipeline_model_parallel_size: {layers} layers don't divide into {stages} stage(s); "
            "set num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage"
        )
    if stages and (layers // stages) % vpp:
        raise ConfigError(
            f"virtual_pipeline_model_parallel_size: {vpp} does not divide the {layers // stages} layers of a stage"
        )


def _check_training(config: Config, world_size: int) -> None:
    layout = config.parallel
    replicas = world_size // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size)
    if not config.data.data:
        raise ConfigError(f"data: a manifest is needed for mode {config.run.mode}")
    if config.sft.base_sft_steps and not config.data.base_data:
        raise ConfigError("base_data: a manifest is needed for base_sft_steps")
    if config.sft.global_batch_size < replicas:
        raise ConfigError(
            f"global_batch_size: {config.sft.global_batch_size} is below the {replicas} data-parallel rank(s)"
        )
    if config.rl.prompts_per_step < replicas:
        raise ConfigError(
            f"prompts_per_step: {config.rl.prompts_per_step} is below the {replicas} data-parallel rank(s)"
        )
    if config.rl.prompts_per_step % config.rl.updates_per_batch:
        raise ConfigError(
            f"updates_per_batch: {config.rl.updates_per_batch} does not divide prompts_per_step "
            f"{config.rl.prompts_per_step}"
        )
    if config.rl.group_size < 2 and config.run.mode != "sft-only":
        raise ConfigError(f"group_size: {config.rl.group_size} answers give no advantage, at least 2 are needed")
    if config.model.attention_backend == "flash" and config.data.share_prompts and config.run.mode != "sft-only":
        raise ConfigError("attention_backend: flash knows no shared prompts; use auto or flex, or share_prompts off")
    if config.rollout.rollout_partial:
        _check_partial(config)
    if config.model.freeze_vision and config.model.freeze_merger and config.model.freeze_language:
        raise ConfigError("freeze_language: with vision and merger frozen too, nothing is left to learn")
    needs_fields = config.rl.old_logprobs == "engine" and config.rl.tis_cap is not None
    if needs_fields:
        raise ConfigError("tis_cap: corrects the trainer's old log-probs; it has no meaning with old_logprobs engine")
    _check_truncation(config)
    tokens = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.data.max_tokens_per_micro_batch < tokens:
        raise ConfigError(
            f"max_tokens_per_micro_batch: {config.data.max_tokens_per_micro_batch} is below max_prompt_tokens + "
            f"max_response_tokens = {tokens}"
        )
    if config.rl.overlong_penalty_tokens > config.rollout.max_response_tokens:
        raise ConfigError(
            f"overlong_penalty_tokens: {config.rl.overlong_penalty_tokens} is above max_response_tokens "
            f"{config.rollout.max_response_tokens}"
        )
    if config.practice.teacher_url and not config.practice.teacher_url.startswith(("http://", "https://")):
        raise ConfigError(f"teacher_url: {config.practice.teacher_url} is not an http(s) address")
    practice = config.practice
    total = practice.mix_weak + practice.mix_retrieved + practice.mix_own + practice.mix_general
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"mix_weak: the shares weak, retrieved, own, general add up to {total:g}, not 1")


def _check_truncation(config: Config) -> None:
    """The loss is over the whole softmax, as SGLang's log-probs are; the other engines' are over what is kept."""
    rollout, rl = config.rollout, config.rl
    field = "top_p" if rollout.top_p < 1 else "top_k"
    truncates = rollout.top_p < 1 or rollout.top_k > 0
    user = "old_logprobs engine" if rl.old_logprobs == "engine" else "tis_cap"
    if truncates and rollout.rollout_engine != "sglang" and (rl.old_logprobs == "engine" or rl.tis_cap is not None):
        raise ConfigError(
            f"{field}: {getattr(rollout, field)} makes {rollout.rollout_engine}'s log-probs those of the kept tokens "
            f"only, which biases {user}; set top_p 1 and top_k 0, or old_logprobs trainer without tis_cap"
        )


def _check_partial(config: Config) -> None:
    rollout, output = config.rollout, config.output
    if config.rl.tis_cap is None and config.rl.old_logprobs == "trainer":
        raise ConfigError(
            "rollout_partial: parts of an answer come from older weights; set tis_cap, or old_logprobs engine"
        )
    if rollout.rollout_step_tokens > rollout.max_response_tokens:
        raise ConfigError(
            f"rollout_step_tokens: {rollout.rollout_step_tokens} is above max_response_tokens "
            f"{rollout.max_response_tokens}"
        )
    if output.dump_rollouts or output.replay_rollouts:
        raise ConfigError("rollout_partial: dump_rollouts and replay_rollouts need steps that end with all answers")


def _check_engine(config: Config, sizes: dict[str, Any]) -> None:
    rollout = config.rollout
    if config.output.replay_rollouts:
        return  # No engine is asked anything.
    if rollout.rollout_engine == "inprocess" and rollout.rollout_url:
        raise ConfigError("rollout_url: the in-process engine has none; set rollout_engine sglang or vllm")
    if rollout.rollout_url and not rollout.rollout_url.startswith(("http://", "https://")):
        raise ConfigError(f"rollout_url: {rollout.rollout_url} is not an http(s) address")
    if rollout.rollout_engine == "vllm" and not rollout.rollout_url:
        raise ConfigError("rollout_url: a vLLM engine is started outside the trainer; give its address")
    if rollout.rollout_python and shutil.which(rollout.rollout_python) is None:
        raise ConfigError(f"rollout_python: {rollout.rollout_python} is no program")
    if rollout.rollout_engine == "sglang" and not rollout.rollout_url and not rollout.rollout_python:
        if importlib.util.find_spec("sglang") is None:
            raise ConfigError("rollout_python: this Python has no sglang; name the Python of the environment it is in")
    if sizes["num_attention_heads"] % rollout.rollout_tensor_parallel_size:
        raise ConfigError(
            f"rollout_tensor_parallel_size: {rollout.rollout_tensor_parallel_size} does not divide the model's "
            f"{sizes['num_attention_heads']} attention heads"
        )
    if rollout.rollout_placement == "disjoint":
        if rollout.rollout_engine != "sglang" or rollout.rollout_url:
            raise ConfigError("rollout_placement: disjoint is for an sglang engine that the trainer starts itself")
        if rollout.weight_transport == "ipc":
            raise ConfigError("rollout_placement: disjoint needs weight_transport distributed or disk")
    for pair in rollout.engine_options:
        if "=" not in pair:
            raise ConfigError(f"engine_options: {pair!r} is not NAME=VALUE")


def _check_output(config: Config) -> None:
    if config.output.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb: the package is not installed; pip install wandb, or leave the option out")
    try:
        unit_of(config.output.best_metric)
    except KeyError:
        raise ConfigError(
            f"best_metric: {config.output.best_metric} is no metric{nearest(config.output.best_metric, UNITS)}"
        ) from None
