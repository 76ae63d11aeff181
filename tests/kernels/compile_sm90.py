"""Compiles every kernel for sm_90a at its production block sizes and prints what the machine code holds, as JSON.

Runs as a child process, without the interpreter; needs no GPU. `python compile_sm90.py [NAME...]`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import triton  # noqa: E402
from dppo_kernels import group_advantages_triton as advantages  # noqa: E402
from dppo_kernels import head_rows_triton as rows  # noqa: E402
from dppo_kernels import linear_logprob_triton as fused  # noqa: E402
from dppo_kernels import policy_loss_triton as policy  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARDS = (152064, 19008)
HIDDEN = (3584, 8192)
INTEGERS = frozenset(
    "columns start rows pitch out_pitch parts count programs sequences split_columns row_blocks".split()
)
ALIGNED = frozenset(("pitch", "out_pitch"))
POINTERS = {"targets_ptr": "*i64", "ids_ptr": "*i64", "cu_ptr": "*i32", "ticket_ptr": "*i32", "mask_ptr": "*u8"}


def measure(kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int, stages: int = 3) -> dict:
    """Registers, local memory, spills and tensor-core instructions of one compiled kernel.

    Pointers and row pitches carry the divisibility the launcher finds at run time.
    """
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, "*fp32") if name.endswith("_ptr") else "fp32"
    hints = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in signature
        if name.endswith("_ptr") or name in ALIGNED
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    options = dict(num_warps=warps, num_stages=stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
        machine = _output(TOOLS / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    return dict(
        registers=int(found[1]),
        stack=int(found[2]),
        local=int(found[3]),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", machine)),
        hgmma=len(re.findall(r"\bHGMMA\b", machine)),
        specialised=[
            each.name
            for each in kernel.params
            if not each.is_constexpr and not each.do_not_specialize and signature[each.name] == "i32"
        ],
        autotuned=not isinstance(kernel, triton.JITFunction),
        target=re.search(r"\.target (\S+)", compiled.asm["ptx"])[1],
    )


def cases() -> dict[str, Any]:
    """Every kernel with the constants and types of production, as thunks by name."""
    found: dict[str, Any] = {}
    for shard in SHARDS:
        block = rows.block_v(shard)
        for entropy in (True, False):
            found[f"stats_kernel[{shard},entropy={entropy}]"] = (
                rows.stats_kernel, dict(ENTROPY=entropy, BLOCK=block), {}, rows.WARPS,
            )  # fmt: skip
            found[f"grads_kernel[{shard},entropy={entropy}]"] = (
                rows.grads_kernel,
                dict(HAS_LOGPROB=True, HAS_ENTROPY=entropy, BLOCK=block),
                dict(out_ptr="*bf16"),
                rows.WARPS,
            )
    for final in (True, False):
        found[f"union_kernel[final={final}]"] = (rows.union_kernel, dict(FINAL=final, BLOCK=rows.BLOCK_C), {}, 4)
    for width in HIDDEN:
        for entropy in (True, False):
            constants = dict(
                WIDTH=width, ENTROPY=entropy, UPCAST=False, SPLITS=fused.SPLITS, GROUP=fused.GROUP,
                BLOCK_M=fused.BLOCK_M, BLOCK_N=fused.BLOCK_N, BLOCK_K=fused.BLOCK_K,
            )  # fmt: skip
            types = dict(
                hidden_desc=f"tensordesc<bf16[{fused.BLOCK_M}, {fused.BLOCK_K}]>",
                weight_desc=f"tensordesc<bf16[{fused.BLOCK_N}, {fused.BLOCK_K}]>",
            )
            found[f"fused_kernel[{width},entropy={entropy}]"] = (
                fused.fused_kernel, constants, types, fused.WARPS, fused.STAGES,
            )  # fmt: skip
    common = dict(REF=True, TIS=True, DUAL=True, KIND=3, NORM=1, BLOCK=policy.BLOCK, LANES=policy.LANES, SUMS=16)
    for weights in (True, False):
        constants = common | dict(WEIGHTS=weights)
        found[f"token_kernel[weights={weights}]"] = (policy.token_kernel, constants, {}, policy.WARPS)
        for level in (True, False):
            more = constants | dict(LEVEL=level, MEAN=True, BY_SEQUENCE=True)
            name = f"sequence_kernel[weights={weights},level={level}]"
            found[name] = (policy.sequence_kernel, more, {}, policy.WARPS)
    found["scale_kernel"] = (policy.scale_kernel, dict(BLOCK=policy.BLOCK), dict(out_ptr="*fp32"), policy.WARPS)
    for scale in ("std", "none", "batch"):
        constants = dict(SCALE=scale, BLOCK_B=advantages.BLOCK_B, BLOCK_J=advantages.BLOCK_J)
        found[f"advantages_kernel[{scale}]"] = (advantages.advantages_kernel, constants, {}, 4)
    return found


def _output(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    wanted = sys.argv[1:]
    result, measured = {}, {}
    for name, case in cases().items():
        if not wanted or any(word in name for word in wanted):
            same = repr(case)  # two shards whose rows are taken in blocks of one size share their code
            result[name] = measured[same] = measured.get(same) or measure(*case)
    print(json.dumps(result))
