"""Check a layout of a large model without its memory.

    python tools/plan.py --dry-run --model-config 72b --tp 8 --pp 4 [--vpp 2] [--json]

Builds every rank's model on the meta device, checks that the weight map takes each key of the checkpoint exactly once
with the right shape, and prints what each pipeline stage holds. `--model-config` is a released size, a checkpoint
folder or a config.json. Needs no GPU, no checkpoint and no second process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from dppo_mcore.config import Config, ModelConfig, ParallelConfig  # noqa: E402
from dppo_mcore.model.config import QwenConfig, check_layout, load_qwen_config, parse_qwen_config  # noqa: E402
from dppo_mcore.runtime import device, parallel  # noqa: E402
from dppo_mcore.runtime.errors import UserError  # noqa: E402

TEXT_SIZES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
}
"""Hidden size, feed-forward size, layers, heads, key-value heads, vocabulary, tied: the released checkpoints."""
VISION_FEED_FORWARD = {"3b": 3420, "7b": 3420, "32b": 3456, "72b": 3456}


def released_config(size: str) -> dict[str, Any]:
    """config.json of a released Qwen2.5-VL checkpoint, as far as the architecture goes."""
    hidden, feed_forward, layers, heads, kv_heads, vocabulary, tied = TEXT_SIZES[size]
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "eos_token_id": 151645,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": VISION_FEED_FORWARD[size],
            "num_heads": 16,
            "in_channels": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }


def qwen_of(name: str) -> QwenConfig:
    """A released size, a checkpoint folder or a config.json."""
    if name.lower() in TEXT_SIZES:
        return parse_qwen_config(released_config(name.lower()))
    path = Path(name)
    if path.is_dir():
        return load_qwen_config(path)
    if path.is_file():
        return parse_qwen_config(json.loads(path.read_text()), str(path))
    raise UserError(f"--model-config {name}: neither one of {', '.join(TEXT_SIZES)} nor a checkpoint folder")


class _OnMeta(TorchFunctionMode):
    """Every tensor made meanwhile has a shape and no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _meta_device() -> Iterator[None]:
    ask = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")
    try:
        with torch.device("meta"), _OnMeta():
            yield
    finally:
        torch.cuda.current_device = ask


@contextmanager
def pretend_rank(rank: int, layout: ParallelConfig) -> Iterator[None]:
    """This process as one rank of the layout's world; its collectives do nothing."""
    device.install()
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=False,
        )
        parallel.seed_everything(0)
        yield
    finally:
        parallel.stop()


def rank_weights(rank: int, qwen: QwenConfig, layout: ParallelConfig) -> tuple[tuple[int, int], dict[str, Any]]:
    """((tensor rank, stage), every parameter of this rank on the meta device)."""
    from megatron.core import parallel_state

    from dppo_mcore.model.model import build_model
    from dppo_mcore.model.weights import named_weights

    with pretend_rank(rank, layout):
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        with _meta_device():
            chunks = build_model(qwen, Config(parallel=layout, model=ModelConfig(dtype="bf16")))
        return place, named_weights(chunks)


def dry_run(qwen: QwenConfig, layout: ParallelConfig) -> dict[str, Any]:
    """Build all ranks, check the coverage of all keys; raises UserError naming the first key that is wrong."""
    from dppo_mcore.model.weight_map import WeightMap
    from dppo_mcore.model.weights import check_shape

    check_layout(qwen, layout)
    device.install()
    began = time.perf_counter()
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    weight_map = WeightMap(qwen)
    taken: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
    parameters = [0] * pp
    for rank in range(tp * pp):
        (tp_rank, stage), weights = rank_weights(rank, qwen, layout)
        for name, parameter in weights.items():
            if not parameter.is_meta:
                raise UserError(f"{name} was built with memory, not on the meta device")
            entry = weight_map[name]
            check_shape(entry, name, parameter, tp)
            if tp_rank == 0:
                parameters[stage] += parameter.numel()
            if entry.copy_of is None:
                for piece in entry.pieces(parameter.detach(), tp, tp_rank):
                    taken[piece.tensor.name].append((stage, tp_rank, piece.start, piece.length))
    for entry in weight_map.exported():
        for part in entry.parts:
            columns = part.shape[1] if entry.kind == "row" else part.shape[0]
            _check_coverage(part.name, columns, entry.kind == "replicated", taken.pop(part.name, []), tp)
    if taken:
        raise UserError(f"{next(iter(taken))} is taken by a rank but is no key of the checkpoint")
    return {
        "tp": tp,
        "pp": pp,
        "vpp": layout.virtual_pipeline_model_parallel_size or 1,
        "ranks": tp * pp,
        "keys": len(weight_map.hf_shapes()),
        "parameters_per_rank": parameters,
        "bf16_gib_per_rank": [round(2 * count / 2**30, 3) for count in parameters],
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _check_coverage(name: str, size: int, replicated: bool, takers: list[tuple[int, int, int, int]], tp: int) -> None:
    """One stage holds the key; there every tensor rank has all of it, or the ranks' shares tile it."""
    stages = {stage for stage, *_ in takers}
    if len(stages) != 1:
        raise UserError(f"{name} lies on {len(stages)} pipeline stages, exactly one must hold it")
    shares = sorted((rank, start, length) for _, rank, start, length in takers)
    if replicated:
        good = shares == [(rank, 0, size) for rank in range(tp)]
    else:
        ends = [0, *(start + length for _, start, length in shares)]
        good = ends[-1] == size and all(start == end for (_, start, _), end in zip(shares, ends, strict=False))
    if not good:
        raise UserError(f"{name} of {size} rows or columns is not covered exactly once: {shares}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", required=True, help="build on the meta device and check")
    parser.add_argument("--model-config", required=True, help="3b, 7b, 32b, 72b, a checkpoint folder or a config.json")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--vpp", type=int, help="model chunks per stage")
    parser.add_argument("--first", type=int, help="layers on the first stage")
    parser.add_argument("--last", type=int, help="layers on the last stage")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # With a GPU, Transformer Engine's modules would take real memory.
    layout = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        virtual_pipeline_model_parallel_size=arguments.vpp,
        num_layers_in_first_pipeline_stage=arguments.first,
        num_layers_in_last_pipeline_stage=arguments.last,
    )
    try:
        found = dry_run(qwen_of(arguments.model_config), layout)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{found['keys']} keys, each exactly once over {found['ranks']} ranks")
    for stage, (count, size) in enumerate(zip(found["parameters_per_rank"], found["bf16_gib_per_rank"], strict=True)):
        print(f"stage {stage}: {count / 1e9:8.3f} B parameters a rank, {size:7.3f} GiB in bf16")
    print(f"{found['seconds']} s, {found['peak_mib']} MiB at most")


if __name__ == "__main__":
    main()
