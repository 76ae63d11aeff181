"""Loss and gradient depend on the global batch only: not on layout, micro-batches, packing or shared prompts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dppo_mcore.config import ParallelConfig
from dppo_mcore.runtime import parallel
from tests.learn.exact import Outcome, outcomes
from tests.support.rank_pool import RankPool

CUTS = ("one", "four", "packed", "packed-unshared")
CASES = [(loss, how) for loss in ("sft", "rl") for how in CUTS] + [
    ("gspo", "four"),
    ("dr_grpo", "one-unshared"),
    ("on_policy", "four"),
    ("rl", "masked"),
    ("sft", "idle"),
]
LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "dp2": ParallelConfig(),
    "tp2_pp2_sp": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    "dp2_tp2": ParallelConfig(tensor_model_parallel_size=2),
    "dp2_pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "dp2_pp2_vpp2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "pp2_vpp2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}
Reference = dict[str, Outcome]


@pytest.fixture(scope="module")
def reference(tiny_dir: str) -> Iterator[Reference]:
    """One rank, one packed micro-batch with shared prompts."""
    parallel.start(ParallelConfig(), seed=0)
    found = outcomes(
        tiny_dir, ParallelConfig(), [(loss, "packed") for loss in ("sft", "rl", "gspo", "dr_grpo", "on_policy")]
    )
    parallel.stop()
    assert found is not None
    yield {loss: outcome for (loss, _), outcome in found.items()}


def compare(name: str, found: Outcome, expected: Outcome) -> None:
    """Loss to 1e-6, every gradient to 1e-5 of the largest entry of its tensor (or of 1 where that is larger)."""
    loss, norm, gradients = found
    assert loss == pytest.approx(expected[0], abs=1e-6), name
    assert norm == pytest.approx(expected[1], rel=1e-5), name
    assert gradients.keys() == expected[2].keys()
    for key, gradient in gradients.items():
        error = float((gradient - expected[2][key]).abs().max())
        assert error <= 1e-5, f"{name}: gradient of {key} is off by {error:.1e}"
        scale = float(expected[2][key].abs().max())
        assert error <= 1e-4 * scale + 1e-8, f"{name}: gradient of {key} is off by {error:.1e} of {scale:.1e}"


@pytest.mark.usefixtures("single_rank")
def test_one_rank(tiny_dir: str, reference: Reference) -> None:
    found = outcomes(tiny_dir, ParallelConfig(), [case for case in CASES if case[1] not in ("masked", "idle")])
    assert found is not None
    for (loss, how), outcome in found.items():
        compare(f"{loss} {how}", outcome, reference[loss])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, tiny_dir: str, reference: Reference, request: pytest.FixtureRequest) -> None:
    four = layout == "tp2_pp2_sp" or layout.startswith("dp2_")
    pool: RankPool = request.getfixturevalue("pool4" if four else "pool2")
    data_parallel = layout.startswith("dp2")
    some = [("rl", "four"), ("rl", "masked"), ("sft", "idle"), ("sft", "packed-unshared")]
    cases = (
        some
        if "dp2_pp2" in layout
        else CASES
        if data_parallel
        else [case for case in CASES if case[1] not in ("masked", "idle")]
    )
    found = pool.run(outcomes, tiny_dir, LAYOUTS[layout], cases)[0]
    for (loss, how), outcome in found.items():
        compare(f"{layout} {loss} {how}", outcome, reference[loss])


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_tied_embeddings(optimizer: str, tiny_tied_dir: str, pool2: RankPool) -> None:
    """Embedding and head share a weight: both gradients count, on one stage and across two."""
    cases = [("rl", "four"), ("sft", "four")]
    single = pool2.run(outcomes, tiny_tied_dir, LAYOUTS["tp2"], cases, optimizer)[0]
    staged = pool2.run(outcomes, tiny_tied_dir, LAYOUTS["pp2"], cases, optimizer)[0]
    shared = pool2.run(outcomes, tiny_tied_dir, LAYOUTS["dp2"], cases, optimizer)[0]
    for case, expected in shared.items():
        compare(f"tied tp2 {case}", single[case], expected)
        compare(f"tied pp2 {case}", staged[case], expected)
