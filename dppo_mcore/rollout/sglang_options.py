"""Options of `sglang.Engine` per device, and the user's own on top."""

from __future__ import annotations

import json
from typing import Any

from dppo_mcore.config import Config
from dppo_mcore.rollout.base import EngineError, Sampling

BY_DEVICE: dict[str, dict[str, Any]] = {
    "cpu": {
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "max_total_tokens": 16384,
        "max_running_requests": 16,
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.1,
    },
    "cuda": {"sampling_backend": "pytorch", "enable_memory_saver": True},
}
ENVIRONMENT: dict[str, dict[str, str]] = {
    "cpu": {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    "cuda": {},
}
BAN = -1e9
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def engine_options(config: Config, device: str, seed: int) -> dict[str, Any]:
    """Keyword arguments of `sglang.Engine` on this device ("cpu" or "cuda")."""
    rollout = config.rollout
    options: dict[str, Any] = {
        "model_path": config.run.model,
        "device": device,
        "dtype": DTYPES[config.model.dtype],
        "tp_size": rollout.rollout_tensor_parallel_size,
        "mem_fraction_static": rollout.engine_memory_fraction,
        "random_seed": seed,
        "skip_server_warmup": True,
        "sleep_on_idle": True,  # else each engine keeps a core busy while the trainer needs them
        "log_level": "warning",
        "host": "127.0.0.1",
        "weight_version": "-1",
        "trust_remote_code": False,
        **BY_DEVICE[device],
    }
    if rollout.rollout_placement == "disjoint":
        options.pop("enable_memory_saver", None)  # nobody else wants its memory
    return options | user_options(rollout.engine_options)


def user_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`NAME=VALUE` pairs; a value is JSON where it parses as such, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise EngineError(f"engine_options: {pair!r} is not NAME=VALUE")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options


def environment(device: str, tensor_parallel: int, gpus: str = "") -> dict[str, str]:
    """Environment variables the engine's process needs on this device; `gpus` as in CUDA_VISIBLE_DEVICES."""
    variables = {**ENVIRONMENT[device], "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = gpus
    if device == "cpu" and tensor_parallel > 1:
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in range(tensor_parallel))
    return variables


def sampling_params(sampling: Sampling, seed: int, max_new_tokens: int) -> dict[str, Any]:
    """SGLang's names for a `Sampling`; banned ids get a bias no logit overcomes."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": max_new_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "logit_bias": {str(token): BAN for token in sampling.banned_token_ids},
        "sampling_seed": seed,
        "skip_special_tokens": True,
        "no_stop_trim": True,
    }
