"""What this machine can do: `python -m dppo_mcore.doctor [--json] [--rollout-python PATH]`.

Exit code 1 when training can't run. Each check says what is there, what its absence costs, and how to get it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "broken"]
WANTED_OPEN_FILES = 65536
WANTED_SHM_GIB = 8
WANTED_DISK_GIB = 20
TEST_SGLANG = ".venv-sglang/bin/python"
"""Of `make setup-sglang`: imports only where the tests' stand-ins for compiled kernels are on its path."""
SGLANG_PYTHONS = (sys.executable, "/opt/sglang/bin/python", TEST_SGLANG)
"""This environment, the image's and the tests'."""
IMPORT_SGLANG = (
    "import importlib.metadata as m; print(m.version('sglang'), flush=True); import sglang; sglang.Engine.generate"
)
SGLANG_IMPORT_S = 120


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    detail: str
    cost: str = ""
    """What is lost without it."""
    remedy: str = ""
    """How to get it."""
    required: bool = False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(package: str, cost: str, remedy: str, required: bool = False, module: str = "") -> Finding:
    """Installed and importable in a process of its own, so that a crash there is a finding and not the end."""
    version = _version(package)
    if version is None:
        return Finding(package, "missing", "not installed", cost, remedy, required)
    probe = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import {module or package.replace('-', '_')}"],
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        return Finding(package, "broken", f"{version} does not import: {_reason(probe)}", cost, remedy, required)
    return Finding(package, "ok", version)


def _reason(probe: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed, in its own last line."""
    return (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]


def gpu() -> Finding:
    """CUDA devices as torch sees them."""
    cost, remedy = "runs on the CPU: right, but only for tiny models", "start the container with --gpus all"
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("gpu", "missing", f"torch does not import: {error}", cost, "make setup")
    if not torch.cuda.is_available():
        return Finding("gpu", "missing", "no CUDA device", cost, remedy)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("gpu", "ok", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")


def driver() -> Finding:
    """The NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return Finding("driver", "missing", "no nvidia-smi", "no GPU training", "install the NVIDIA driver")
    probe = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    if probe.returncode:
        return Finding("driver", "broken", probe.stdout.strip() or probe.stderr.strip(), "no GPU training", "see dmesg")
    return Finding("driver", "ok", probe.stdout.split()[0])


def nccl() -> Finding:
    """Collectives between GPUs; gloo serves the CPU."""
    cost, remedy = "no multi-GPU", "use an NGC image"
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        return Finding("nccl", "missing", f"torch does not import: {error}", cost, remedy)
    if dist.is_nccl_available():
        return Finding("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    return Finding("nccl", "missing", "torch was built without it; gloo is used", cost, remedy)


def dali_codecs() -> Finding:
    """Which codecs DALI decodes on which device."""
    finding = _package("nvidia-dali-cuda130", "video is decoded by PyAV on the CPU", "make setup", module="nvidia.dali")
    if finding.state != "ok":
        return finding
    where = "h264, hevc, av1, vp8, vp9, mpeg4 (by NVDEC's list, not tried)" if gpu().state == "ok" else "none here"
    return Finding("dali", "ok", f"{finding.detail}; GPU: {where}; CPU: vp8, vp9, mjpeg")


def sglang(rollout_python: str = "") -> Finding:
    """SGLang in the Python that `--rollout-python` names; without one, where it usually is."""
    found = [_sglang_of(python) for python in ([rollout_python] if rollout_python else SGLANG_PYTHONS)]
    state = min((state for state, _ in found), key=("ok", "broken", "missing").index)
    detail = "; ".join(detail for its_state, detail in found if its_state == state)
    cost = "rollouts by the in-process engine only"
    remedy = 'pip install "sglang[all]==0.5.23" in an environment of its own; --rollout-python names its Python'
    return Finding("sglang", state, detail, cost, remedy)


def _sglang_of(python: str) -> tuple[State, str]:
    """Whether a Python has SGLang and can import its engine, which its metadata alone don't say."""
    if shutil.which(python) is None:
        return "missing", f"no {python}"
    try:
        probe = subprocess.run(
            [python, "-W", "ignore", "-c", IMPORT_SGLANG], capture_output=True, text=True, timeout=SGLANG_IMPORT_S
        )
    except subprocess.TimeoutExpired:
        return "broken", f"not imported within {SGLANG_IMPORT_S} s by {python}"
    if not probe.stdout:
        return "missing", f"none in {python}"
    where = f"{probe.stdout.split()[0]} in {python}" + (" (for this project's tests)" if python == TEST_SGLANG else "")
    if probe.returncode:
        return "broken", f"{where} does not import: {_reason(probe)}"
    return "ok", where


def shared_memory() -> Finding:
    """Room for media embeddings and weight buckets between processes."""
    size = shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").exists() else 0.0
    if size < WANTED_SHM_GIB:
        return Finding("shared memory", "missing", f"{size:.1f} GiB", "weights and embeddings go by disk",
                       f"docker run --shm-size={WANTED_SHM_GIB}g, or --ipc=host")  # fmt: skip
    return Finding("shared memory", "ok", f"{size:.1f} GiB")


def open_files() -> Finding:
    """The limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < WANTED_OPEN_FILES and hard < WANTED_OPEN_FILES:
        return Finding("open files", "missing", f"limit {soft}", "many ranks or workers run into it",
                       f"ulimit -n {WANTED_OPEN_FILES}")  # fmt: skip
    return Finding("open files", "ok", f"limit {soft}, can be raised to {hard}")


def disk() -> Finding:
    """Free space for the run folder."""
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    if free < WANTED_DISK_GIB:
        return Finding(
            "disk", "missing", f"{free:.0f} GiB free", "checkpoints may not fit", "free some space, or --save"
        )
    return Finding("disk", "ok", f"{free:.0f} GiB free")


def checks(rollout_python: str = "") -> list[Callable[[], Finding]]:
    """All checks, in the order they are shown."""
    own, image = "make setup", "use an NGC PyTorch image, or pip install '.[gpu]'"
    return [
        lambda: _package("torch", "nothing runs", own, required=True),
        lambda: _package("megatron-core", "nothing runs", own, required=True, module="megatron.core"),
        lambda: _package("transformers", "no tokenizer, no training", own, required=True),
        lambda: _package("triton", "no Triton kernels: the torch reference is used", own),
        lambda: _package("safetensors", "checkpoints can't be read", own, required=True),
        lambda: _package("av", "no PyAV decoding", own, required=True),
        gpu,
        driver,
        nccl,
        lambda: _package(
            "transformer-engine", "local layers instead of fused ones", image, module="transformer_engine.pytorch"
        ),
        # The package index has an unrelated apex; NVIDIA's has optimizers.
        lambda: _package(
            "apex", "torch's optimizer instead of the fused one", "use an NGC PyTorch image", module="apex.optimizers"
        ),
        lambda: _package("flash-attn", "FlexAttention or SDPA instead", "use an NGC PyTorch image"),
        lambda: sglang(rollout_python),
        lambda: _package("vllm", "no vLLM engine", "an environment of its own with vllm, given by --rollout-url"),
        dali_codecs,
        shared_memory,
        open_files,
        disk,
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dppo_mcore.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--rollout-python", default="", help="Python of the environment SGLang lives in")
    arguments = parser.parse_args()
    findings = [check() for check in checks(arguments.rollout_python)]
    able = all(finding.state == "ok" for finding in findings if finding.required)
    if arguments.json:
        print(json.dumps({"can_train": able, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        for finding in findings:
            print(f"{finding.state:8} {finding.name:22} {finding.detail}")
            if finding.state != "ok":
                print(f"{'':31} without it: {finding.cost}; to get it: {finding.remedy}")
        print("training can run here" if able else "training can NOT run here")
    raise SystemExit(0 if able else 1)


if __name__ == "__main__":
    main()
