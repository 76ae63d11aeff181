"""Weight sync, stage by stage: per tensor, bucketed, and against copying the same bytes once.

    python tools/bench_sync.py [--mib 512] [--bucket-mib 64] [--tp 2 --pp 2] [--engine PYTHON] [--json FILE]

A random model of at least `--mib` MiB is laid over TP x PP ranks of this machine and its weights are handed to an
engine through shared memory. Without `--engine` a process of this environment stands at the other end, which copies
every tensor into its own memory as an engine does; with it, a real SGLang in that environment does.
Times are the leader's, the best of `--repeats`; the ratio comes last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "kernels", ROOT / "tools"):
    sys.path.insert(0, str(folder))


class CopyingReceiver:
    """An engine's half without an engine: another process that maps each bucket and copies every tensor out of it."""

    transports = frozenset({"ipc"})
    wants_vision = False

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_copy_loop, args=(theirs,), daemon=False)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def begin(self, version: int) -> None:
        """Nothing to hold."""

    def end(self, version: int) -> None:
        """Nothing to let go."""

    def load_shared(self, metas: Sequence[Any], handle: Mapping[str, Any]) -> None:
        """Have it copied; returns when that is done."""
        self._pipe.send(("load", handle))
        self._pipe.recv()

    def fingerprints(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Of what was copied."""
        self._pipe.send(("fingerprints", None))
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _copy_loop(pipe: Any) -> None:
    import torch

    from dppo_mcore.rollout import wire
    from dppo_mcore.rollout.fingerprint import fingerprint

    torch.set_num_threads(1)
    own: dict[str, Any] = {}
    pipe.send("ready")
    while True:
        try:
            command, handle = pipe.recv()
        except EOFError:
            return
        if command == "fingerprints":
            pipe.send({name: fingerprint(tensor) for name, tensor in own.items()})
            continue
        flat = wire.attach(handle)
        for slot in map(wire.Slot.from_json, handle["slots"]):
            view = slot.view(flat)
            if slot.name not in own:
                own[slot.name] = torch.empty_like(view)
            own[slot.name].copy_(view)
        del flat
        pipe.send("done")


class BenchEngine:
    """As much of an engine as a sync needs."""

    name = "bench"

    def __init__(self, replica: Any, receiver: Any) -> None:
        self.replica, self.receiver = replica, receiver
        self.weight_version = -1

    def update_weights(self, version: int, load: Any = None) -> None:
        """Run the load."""
        load()
        self.weight_version = version

    def revive(self, error: BaseException) -> bool:
        """There is nothing to start anew."""
        return False


def rank_main(rank: int, world: int, port: int, options: argparse.Namespace, results: Any) -> None:
    """One trainer rank."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    import warnings

    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    from dppo_mcore.config import Config, ModelConfig, ParallelConfig, RolloutConfig, RunConfig
    from dppo_mcore.model.model import build_model
    from dppo_mcore.rollout.replica import Replica
    from dppo_mcore.runtime import parallel
    from dppo_mcore.sync.push import WeightSync

    layout = ParallelConfig(tensor_model_parallel_size=options.tp, pipeline_model_parallel_size=options.pp)
    config = Config(
        run=RunConfig(model=options.model, run=options.model + "-run"),
        parallel=layout,
        model=ModelConfig(dtype=options.dtype),
        rollout=RolloutConfig(
            rollout_engine="sglang", rollout_python=options.engine, sync_bucket_mib=options.bucket_mib
        ),
    )
    parallel.start(layout, seed=0)
    qwen = bench_qwen(options)
    chunks = build_model(qwen, config)
    if options.engine:
        from dppo_mcore.rollout.base import make_engine

        options_cpu = ("chat_template=qwen2-vl", "load_format=dummy", "max_total_tokens=2048", "max_running_requests=2")
        config = replace(config, rollout=replace(config.rollout, engine_options=options_cpu))
        engine: Any = make_engine(config, qwen, chunks, None)  # type: ignore[arg-type]
        engine.start()
    else:
        replica = Replica()
        engine = BenchEngine(replica, CopyingReceiver() if replica.is_leader else _Absent())
    ways = {
        "per tensor": {"bucket_bytes": 0, "overlap": False},
        "bucketed": {"overlap": False},
        "bucketed, overlapped": {"overlap": True},
    }
    rows: dict[str, Any] = {}
    for name, way in ways.items():
        best: dict[str, Any] = {}
        for repeat in range(options.repeats + 1):
            sync = WeightSync(chunks, engine, qwen, config, verified=False, **way)
            began = time.perf_counter()
            report = sync.push(repeat + 1)
            total = time.perf_counter() - began
            if repeat and (not best or total < best["total"]):
                best = {"total": total, **report.seconds, "buckets": report.buckets, "peak": report.peak_extra_bytes}
                best["bytes"] = report.nbytes
        rows[name] = best
    sync = WeightSync(chunks, engine, qwen, config)
    rows["verify"] = sync.push(99).seconds["verify"]
    if engine.replica.is_leader:
        rows["copy once"] = copy_once(engine.receiver, rows["bucketed"]["bytes"], options)
        results.send(rows)
    if options.engine:
        engine.stop()
    elif engine.replica.is_leader:
        engine.receiver.close()
    parallel.stop()


class _Absent:
    transports = frozenset({"ipc"})
    wants_vision = False


def copy_once(receiver: Any, nbytes: int, options: argparse.Namespace) -> float:
    """Seconds to fill shared memory with that many bytes and have the other end load it, bucket after bucket."""
    import torch

    from dppo_mcore.rollout import wire

    if options.engine:
        return float("nan")
    size = options.bucket_mib << 20
    source = torch.ones(size, dtype=torch.uint8)
    buffer = wire.SharedBuffer(size)
    best = float("inf")
    for _ in range(options.repeats + 1):
        began = time.perf_counter()
        left = nbytes
        while left > 0:
            count = min(size, left)
            buffer.bytes()[:count].copy_(source[:count])
            slot = wire.Slot(f"copy-{left}", "uint8", (count,), 0)
            receiver.load_shared([], {**buffer.handle, "slots": [slot.to_json()]})
            left -= count
        best = min(best, time.perf_counter() - began)
    buffer.close()
    return best


def bench_qwen(options: argparse.Namespace) -> Any:
    """The configuration in the model's folder."""
    from dppo_mcore.model.config import load_qwen_config

    return load_qwen_config(options.model)


def write_config(folder: Path, mib: int, dtype: str) -> None:
    """A Qwen2.5-VL configuration of at least `mib` MiB: the tiny one, widened and deepened."""
    import make_tiny

    make_tiny.make(folder)
    raw = json.loads((folder / "config.json").read_text())
    text, vision = raw["text_config"], raw["vision_config"]
    hidden, ffn, vocabulary, itemsize = 1024, 2816, 16384, 2 if dtype == "bf16" else 4
    layer = hidden * (hidden * 2 + hidden) + 3 * hidden * ffn
    layers = max(2, -(-((mib << 20) // itemsize - 2 * vocabulary * hidden) // layer))
    layers += layers % 2
    text |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocabulary}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 8, "layer_types": ["full_attention"] * layers}
    text["rope_parameters"] |= {"mrope_section": [8, 12, 12]}
    vision["out_hidden_size"] = hidden
    (folder / "config.json").write_text(json.dumps(raw))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="least size of the random model")
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", default="", help="Python of an environment with SGLang")
    parser.add_argument("--json", default="", help="also write the figures to this file")
    options = parser.parse_args()
    from dppo_mcore.rollout.weight_group import free_port

    world, port = options.tp * options.pp, free_port()
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as folder:
        options.model = str(Path(folder) / "model")
        write_config(Path(options.model), options.mib, options.dtype)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        ranks = [context.Process(target=rank_main, args=(r, world, port, options, theirs)) for r in range(world)]
        for rank in ranks:
            rank.start()
        theirs.close()
        rows = ours.recv()
        for rank in ranks:
            rank.join()
    show(rows, options)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def show(rows: dict[str, Any], options: argparse.Namespace) -> None:
    """One table, ratios last."""
    overlapped, single = rows["bucketed, overlapped"], rows["per tensor"]
    mib = overlapped["bytes"] / 2**20
    print(f"{mib:.0f} MiB over TP{options.tp} x PP{options.pp}, buckets of {options.bucket_mib} MiB, seconds")
    print(f"{'':24}{'plan':>8}{'gather':>8}{'wait':>8}{'load':>8}{'total':>8}{'buckets':>9}{'peak MiB':>10}")
    for name in ("per tensor", "bucketed", "bucketed, overlapped"):
        row = rows[name]
        figures = "".join(f"{row[key]:8.3f}" for key in ("plan", "gather", "wait", "load", "total"))
        print(f"{name:24}{figures}{row['buckets']:9}{row['peak'] / 2**20:10.0f}")
    print(f"{'fingerprints':24}{rows['verify']:40.3f}")
    print(f"{'the bytes copied once':24}{rows['copy once']:40.3f}")
    print(f"per tensor / overlapped: {single['total'] / overlapped['total']:.2f}x")
    print(f"overlapped / copied once: {overlapped['total'] / rows['copy once']:.2f}x")


if __name__ == "__main__":
    main()
