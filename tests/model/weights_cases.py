"""Rank functions of the weight tests: round trips in every layout, and what a load costs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from dppo_mcore.config import Config, ModelConfig, ParallelConfig
from dppo_mcore.model.config import QwenConfig, load_qwen_config
from dppo_mcore.model.model import build_model
from dppo_mcore.model.safetensors_io import CheckpointReader, TensorSpec, plan_files, write_checkpoint
from dppo_mcore.model.weight_map import WeightMap
from dppo_mcore.model.weights import export_hf, iter_hf_weights, load_hf_weights, named_weights
from dppo_mcore.runtime import parallel as runtime

Digests = dict[str, tuple[str, str]]


def digest(tensor: torch.Tensor) -> tuple[str, str]:
    """Type and content."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return str(tensor.dtype), hashlib.sha256(raw.tobytes()).hexdigest()


def folder_digests(folder: str | Path) -> Digests:
    """Of every tensor in a checkpoint folder, under canonical names."""
    from dppo_mcore.model.weight_map import canonical_name

    reader = CheckpointReader(Path(folder))
    return {canonical_name(name): digest(reader.view(name)) for name in reader.tensors}


def load(folder: str, parallel: ParallelConfig, dtype: str = "fp32") -> tuple[list[Any], QwenConfig, Any]:
    """Lay the groups, build the chunks and load them."""
    runtime.reinit(parallel, seed=0)
    qwen = load_qwen_config(folder)
    chunks = build_model(qwen, Config(parallel=parallel, model=ModelConfig(dtype=dtype)))
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    return chunks, qwen, load_hf_weights(chunks, folder, qwen)


def round_trip(folder: str, parallel: ParallelConfig, dtype: str = "fp32") -> tuple[Digests, int, int]:
    """Digests of what comes back out, and the load's requested and own bytes."""
    chunks, qwen, report = load(folder, parallel, dtype)
    for chunk in chunks:
        assert not any(parameter.isnan().any() for parameter in chunk.parameters())
    found = {name: digest(tensor) for name, tensor in iter_hf_weights(chunks, qwen)}
    return found, report.bytes_requested, report.own_bytes


def merged_loads(folder: str, parallel: ParallelConfig, dtype: str) -> Digests:
    """Digests of the checkpoint put together from what every rank of a layout loads, one pretended after the other."""
    import plan

    qwen = load_qwen_config(folder)
    weight_map = WeightMap(qwen)
    shards: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    tp = parallel.tensor_model_parallel_size
    for rank in range(tp * parallel.pipeline_model_parallel_size):
        with plan.pretend_rank(rank, parallel):
            chunks = build_model(qwen, Config(parallel=parallel, model=ModelConfig(dtype=dtype)))
            report = load_hf_weights(chunks, folder, qwen)
            assert report.bytes_requested == report.own_bytes
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            for name, parameter in named_weights(chunks).items():
                entry = weight_map[name]
                if entry.copy_of is not None:
                    assert torch.equal(parameter, shards[entry.copy_of][tp_rank])
                    continue
                same = shards[entry.name].setdefault(tp_rank, parameter.data)
                assert same is parameter.data or torch.equal(same, parameter)
    found = {}
    for entry in weight_map.exported():
        ranks = [shards[entry.name][rank] for rank in range(tp)]
        if entry.kind == "replicated":
            assert all(torch.equal(ranks[0], other) for other in ranks)
        found |= {name: digest(tensor) for name, tensor in entry.merge(ranks)}
    return found


def export(folder: str, parallel: ParallelConfig, out: str, **options: Any) -> None:
    chunks, qwen, _ = load(folder, parallel, options.pop("dtype", "fp32"))
    export_hf(chunks, qwen, folder, out, **options)


def wide_checkpoint(folder: Path, source: str, hidden: int, layers: int, vocab: int, seed: int = 0) -> QwenConfig:
    """A random bf16 checkpoint with the layout of `source`'s but large language layers, in several files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((Path(source) / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 16, "num_key_value_heads": 8, "vocab_size": vocab,
        "layer_types": ["full_attention"] * layers,
    }  # fmt: skip
    config["vision_config"]["out_hidden_size"] = hidden
    (folder / "config.json").write_text(json.dumps(config))
    qwen = load_qwen_config(folder)
    generator = torch.Generator().manual_seed(seed)
    shapes = WeightMap(qwen).hf_shapes()

    def tensors() -> Any:
        # One random block, shifted per tensor: writing a gigabyte of fresh noise would only test the generator.
        block = torch.randn(1 << 20, generator=generator).to(torch.bfloat16)
        for number, (name, shape) in enumerate(shapes.items()):
            count = torch.Size(shape).numel()
            yield name, block.roll(number).repeat(-(-count // block.numel()))[:count].view(shape)

    specs = (TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items())
    write_checkpoint(folder, plan_files(specs, 300 * 2**20), tensors())
    return qwen


class PeakAnonymous:
    """Watches the process's anonymous memory while it is entered; `growth` is the peak above the start, in bytes."""

    def __enter__(self) -> PeakAnonymous:
        self._start, self._peak, self._stop = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, anonymous_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, anonymous_bytes())

    @property
    def growth(self) -> int:
        return self._peak - self._start


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def load_costs(folder: str, parallel: ParallelConfig) -> dict[str, float]:
    """Bytes asked for and anonymous memory of build plus load, against the shard and the largest tensor."""
    runtime.reinit(parallel, seed=0)
    qwen = load_qwen_config(folder)
    dist.barrier()
    with PeakAnonymous() as memory:
        chunks = build_model(qwen, Config(parallel=parallel, model=ModelConfig(dtype="bf16")))
        report = load_hf_weights(chunks, folder, qwen)
    shard = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
    largest = max(torch.Size(shape).numel() for shape in WeightMap(qwen).hf_shapes().values()) * 2
    return {
        "requested": report.bytes_requested,
        "own": report.own_bytes,
        "shard": shard,
        "largest": largest,
        "anonymous": memory.growth,
        "seconds": report.seconds,
    }
