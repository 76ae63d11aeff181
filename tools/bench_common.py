"""What the benchmarks share: round-robin timing, peak memory, the machine's own ceilings, one table."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "kernels", ROOT / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from live_memory import LiveMemory  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Work = Callable[[], Any]


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    found = dict(date=datetime.date.today().isoformat(), torch=torch.__version__, python=platform.python_version())
    found["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    return found


def time_all(contenders: dict[str, Work], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round, in turn (ABCABC), with a cold L2 on CUDA.

    A contender that raises is reported on stderr and left out.
    """
    working: dict[str, Work] = {}
    for name, work in contenders.items():
        try:
            for _ in range(warmup):
                work()
            synchronize()
            working[name] = work
        except Exception as error:
            print(f"skipped {name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}", file=sys.stderr)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE) if DEVICE == "cuda" else None
    found: dict[str, list[float]] = {name: [] for name in working}
    for _ in range(rounds):
        for name, work in working.items():
            if flush is not None:
                flush.zero_()
            found[name].append(time_one(work))
    return found


def time_one(work: Work) -> float:
    """Milliseconds of one call: CUDA events, or on CPU the process's own time, free of its neighbours."""
    if DEVICE == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    began = time.process_time()
    work()
    return (time.process_time() - began) * 1e3


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> str:
    """10th to 90th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return f"{ordered[round(last * 0.1)]:.3g}..{ordered[round(last * 0.9)]:.3g}"


def ratio(of: list[float], to: list[float]) -> float:
    """Median of the ratios round by round."""
    return median([a / b for a, b in zip(of, to, strict=True)])


def peak_mib(work: Work) -> float:
    """Most memory held at once during a call beyond what was there before, gradients it leaves included."""
    if DEVICE == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with LiveMemory() as memory:
        work()
    return memory.peak_bytes / 2**20


def launches(work: Work) -> int | None:
    """Kernels a call starts; None where there is no GPU."""
    if DEVICE != "cuda":
        return None
    work()
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")


def copy_gigabytes_per_second() -> float:
    """Read plus write bandwidth of a large copy (4 GB on CUDA)."""
    source = torch.randn((1 << 30) if DEVICE == "cuda" else (1 << 24), device=DEVICE)
    target = torch.empty_like(source)
    times = time_all(dict(copy=lambda: target.copy_(source)), rounds=8)["copy"]
    return 2 * source.numel() * 4 / median(times) / 1e6


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """One table, its columns in the order of the first row."""
    print(f"\n{title}")
    if not rows:
        print("  (nothing ran)")
        return
    names = list(rows[0])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    for line in (names, *cells):
        print("  " + "  ".join(text.rjust(width) if i else text.ljust(width) for i, (text, width) in
                               enumerate(zip(line, widths, strict=True))))  # fmt: skip


def save(path: str | None, result: dict[str, Any]) -> None:
    """Write the figures as JSON, if asked."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(dict(environment=environment()) | result, indent=1) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
