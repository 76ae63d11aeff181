"""What the data path costs beyond decoding, on a 64 s 640x480 h264 clip sampled at 2 fps.

    python tools/bench_video.py [--repeats 5] [--clips 300] [--rows 1000000] [--run RUN] [--json OUT]

CPU time of: ours (probe, plan, decode, resize, patchify), the same parts called directly (every frame up to the last
wanted one decoded, the wanted ones converted, resized and patchified), and decoding alone. Then the memory that many
clips in a row leave behind, and the opening of a large manifest. With --run, how long a run's loop waited for data.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch

from dppo_mcore.config import DataConfig
from dppo_mcore.data import probe as probing
from dppo_mcore.data.decode import make_decoder
from dppo_mcore.data.decode_pyav import CONVERSION
from dppo_mcore.data.frames import plan_media
from dppo_mcore.data.patches import Geometry, normalise, patchify, resize
from dppo_mcore.types import FramePlan, Media

SECONDS, RATE, WIDTH, HEIGHT = 64, 30, 640, 480


def write_clip(path: Path, seconds: int, width: int, height: int) -> None:
    """A textured picture that drifts, with a bright square that moves the other way; x264's usual B-frames."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    texture = np.kron(noise, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "26"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(seconds * RATE):
            frame = np.roll(texture, number // 2, axis=1)
            left = (width - 40 - 3 * number) % (width - 40)
            frame[height // 3 : height // 3 + 40, left : left + 40] = (250, 240, 80)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def ours(path: str, data: DataConfig, geometry: Geometry) -> torch.Tensor:
    """The whole of the data path, nothing remembered."""
    probing._probe.cache_clear()
    plan = plan_media(Media("video", path), data, None, geometry)
    return normalise(patchify(make_decoder("pyav", torch.device("cpu"))(plan), geometry), geometry)


def frames_of(plan: FramePlan, convert: bool) -> list[torch.Tensor]:
    """Every frame up to the last wanted one decoded; the wanted ones as RGB where asked."""
    wanted = set(plan.indices)
    found = []
    with av.open(plan.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if convert and number in wanted:
                rgb = frame.reformat(format="rgb24", interpolation=CONVERSION, threads=1).to_ndarray()
                found.append(torch.from_numpy(rgb).permute(2, 0, 1))
            if number == plan.indices[-1]:
                break
    return found


def direct(plan: FramePlan, geometry: Geometry) -> torch.Tensor:
    """The parts called one after the other on a plan that exists already."""
    frames = [resize(frame_CHW[None], plan.size) for frame_CHW in frames_of(plan, convert=True)]
    return normalise(patchify(torch.cat(frames), geometry), geometry)


def cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU time of this process, all threads."""
    gc.collect()
    began = time.process_time()
    call()
    return time.process_time() - began


def bench_cost(path: str, repeats: int) -> dict[str, float]:
    """Medians over interleaved repeats, so that a busy machine weighs on all three alike."""
    data, geometry = DataConfig(), Geometry()
    plan = plan_media(Media("video", path), data, None, geometry)
    assert torch.equal(ours(path, data, geometry), direct(plan, geometry))
    times: dict[str, list[float]] = {"ours": [], "direct": [], "decode": []}
    for _ in range(repeats):
        times["ours"].append(cpu_seconds(lambda: ours(path, data, geometry)))
        times["direct"].append(cpu_seconds(lambda: direct(plan, geometry)))
        times["decode"].append(cpu_seconds(lambda: frames_of(plan, convert=False)))
    medians = {f"{name}_cpu_s": statistics.median(values) for name, values in times.items()}
    return {
        "frames": len(plan.indices),
        **medians,
        "ours_over_decode": medians["ours_cpu_s"] / medians["decode_cpu_s"],
        "ours_over_direct": medians["ours_cpu_s"] / medians["direct_cpu_s"],
    }


def bench_memory(path: str, clips: int) -> dict[str, float]:
    """Resident memory before and after many clips, measured once the first twenty have warmed the allocator."""
    data, geometry = replace(DataConfig(), max_frames=16), Geometry()
    process = psutil.Process()
    for _ in range(20):
        ours(path, data, geometry)
    gc.collect()
    before = process.memory_info().rss
    for _ in range(clips):
        ours(path, data, geometry)
    gc.collect()
    return {"clips": clips, "rss_growth_mb": (process.memory_info().rss - before) / 1e6}


MANIFEST_SCRIPT = """
import json, sys, time
import psutil
from dppo_mcore.data.manifest import read_manifest
began = time.perf_counter()
manifest = read_manifest(sys.argv[1])
opened = time.perf_counter() - began
step = max(len(manifest) // 1000, 1)
ids = [manifest[row].id for row in range(0, len(manifest), step)]
assert manifest.get(ids[-1]).id == ids[-1]
print(json.dumps({"rows": len(manifest), "open_s": opened,
                  "rss_mb": psutil.Process().memory_info().rss / 1e6}))
"""


def bench_manifest(folder: Path, rows: int) -> dict[str, float]:
    """Indexing, then opening in a fresh process with a thousand rows read."""
    path = folder / "large.jsonl"
    with open(path, "w") as file:
        for row in range(rows):
            turns = [{"role": "user", "content": f"<video>Question {row}: what happens next?"}]
            media = [{"type": "video", "path": f"clips/{row % 5000}.mp4"}]
            file.write(json.dumps({"id": f"row-{row}", "objective": "prediction", "messages": turns, "media": media,
                                   "gold": "ABCD"[row % 4]}) + "\n")  # fmt: skip
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[1]))

    def fresh() -> dict[str, float]:
        command = [sys.executable, "-c", MANIFEST_SCRIPT, str(path)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)

    indexed = fresh()
    opened = fresh()
    return {
        "rows": opened["rows"],
        "index_s": indexed["open_s"],
        "open_s": opened["open_s"],
        "rss_mb": opened["rss_mb"],
    }


def bench_wait(run: Path) -> dict[str, float]:
    """Share of a run's step time that its loop waited for data, from its metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/step" in row]
    waited = sum(row.get("time/data", 0.0) for row in steps)
    total = sum(row["time/step"] for row in steps)
    if not total:
        raise SystemExit(f"{run}: its metrics.jsonl holds no time/step")
    return {"run_data_wait_s": waited, "run_step_s": total, "wait_share": waited / total}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="repeats of the cost comparison")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="length of the clip")
    parser.add_argument("--clips", type=int, default=300, help="clips in a row for memory; 0 leaves it out")
    parser.add_argument("--rows", type=int, default=0, help="rows of a manifest to open; 0 leaves it out")
    parser.add_argument("--run", default="", help="run folder whose waits to report")
    parser.add_argument("--json", default="", help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.clips:
            short = Path(folder) / "short.mp4"
            write_clip(short, 4, 320, 240)
            figures |= bench_memory(str(short), arguments.clips)
        if arguments.rows:
            figures |= bench_manifest(Path(folder), arguments.rows)
        if arguments.repeats:
            clip = Path(folder) / "clip.mp4"
            write_clip(clip, arguments.seconds, WIDTH, HEIGHT)
            figures |= bench_cost(str(clip), arguments.repeats)
    if arguments.run:
        figures |= bench_wait(Path(arguments.run))
    for name, value in figures.items():
        print(f"{name:<20} {value:>12.3f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
