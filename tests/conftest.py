"""Fixtures shared by all tests: rank pools, tiny checkpoints, markers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "kernels", ROOT / "tools", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402

# Triton decides between interpreter and compiler when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

from tests.support.deadline import pytest_runtest_call, pytest_runtest_setup, pytest_runtest_teardown  # noqa: E402
from tests.support.rank_pool import RankPool  # noqa: E402

__all__ = ["pytest_runtest_call", "pytest_runtest_setup", "pytest_runtest_teardown"]

torch.set_num_threads(1)
pytest_plugins = [
    f"tests.support.{path.stem}"
    for path in sorted((ROOT / "tests" / "support").glob("*.py"))
    if path.stem == "sglang_server" or path.stem.endswith("_fixtures")
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests are skipped without a GPU; everything else that can't run fails."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def same_scheduling() -> Iterator[None]:
    """A library that leaves this process at real-time priority would starve all tests after it (SVT-AV1 does)."""
    before = os.sched_getscheduler(0)
    yield
    after = os.sched_getscheduler(0)
    if after != before:
        os.sched_setscheduler(0, before, os.sched_param(0))
    assert after == before, f"the test changed this process's scheduling policy from {before} to {after}"


@pytest.fixture(scope="session")
def pool2() -> Iterator[RankPool]:
    """Two living ranks."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool4() -> Iterator[RankPool]:
    """Four living ranks."""
    pool = RankPool(4)
    yield pool
    pool.close()


def _tiny(tmp_path_factory: pytest.TempPathFactory, name: str, **options: object) -> str:
    import make_tiny

    return str(make_tiny.make(tmp_path_factory.mktemp("checkpoints") / name, **options))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hugging Face directory of the tiny random checkpoint, untied."""
    return _tiny(tmp_path_factory, "tiny")


@pytest.fixture(scope="session")
def tiny_tied_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with head and embedding tied."""
    return _tiny(tmp_path_factory, "tiny_tied", tied=True)


@pytest.fixture(scope="session")
def tiny_odd_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tied, with a vocabulary that no number of ranks divides."""
    return _tiny(tmp_path_factory, "tiny_odd", tied=True, vocab_size=1011)


@pytest.fixture(scope="session")
def tiny_legacy_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with an older release's config.json and no video processor file."""
    return _tiny(tmp_path_factory, "tiny_legacy", legacy_config=True)


@pytest.fixture
def single_rank() -> Iterator[None]:
    """This process as a world of one rank with Megatron's parallel state."""
    from dppo_mcore.config import ParallelConfig
    from dppo_mcore.runtime import parallel

    parallel.start(ParallelConfig(), seed=0)
    yield
    parallel.stop()
