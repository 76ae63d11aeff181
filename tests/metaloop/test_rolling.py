"""Which answers are still owed when some are recorded, and prompts that are decoded before they are asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dppo_mcore.config import Config, DataConfig, ParallelConfig
from dppo_mcore.data.ahead import PromptSource
from dppo_mcore.data.loader import divide, home_of
from dppo_mcore.data.messages import Request
from dppo_mcore.metaloop.exchange import Exchange
from dppo_mcore.metaloop.rolling import agreed, announce, load_prompts, owed
from dppo_mcore.runtime import parallel
from dppo_mcore.types import Media, Prompt, Sample, Turn
from tests.data.clips import write_clip
from tests.support.rank_pool import RankPool


@pytest.mark.parametrize(
    ("have", "n", "expected"),
    [([], 3, [(0, 3)]), ([0, 1, 2], 3, []), ([0], 3, [(1, 2)]), ([1], 4, [(0, 1), (2, 2)]), ([5], 2, [(0, 2)])],
)
def test_owed(have: list[int], n: int, expected: list[tuple[int, int]]) -> None:
    assert owed(have, n) == expected


def test_what_comes_next_is_decoded_meanwhile(tiny_dir: str, tmp_path: Path) -> None:
    """Announced prompts of this replica are ready when they are asked for; what isn't asked for is forgotten."""
    clips = [write_clip(tmp_path / f"{number}.mp4", frames=16, size=(56, 56)) for number in range(8)]
    turns = (Turn("user", "<video>Done?"),)
    samples = {str(n): Sample(str(n), "success", turns, (Media("video", str(path)),)) for n, path in enumerate(clips)}
    config = Config(data=DataConfig(data_workers=1, decode_ahead=8, media_cache_mib=0))
    exchange = SimpleNamespace(replica=0, replicas=1, rank=0, common=set)
    source = PromptSource(tiny_dir, config.data)
    run = SimpleNamespace(config=config, exchange=exchange, source=source, sample=lambda _, name: samples[name])
    announce(run, list("0123"), "rl", 32.0)
    futures = list(source._pending.values())
    assert len(futures) == 4
    for future in futures:
        future.result(60)
    assert list(load_prompts(run, list("0124"), "rl", 32.0)) == list("0124")
    assert source.counts["decode/pyav"] == 4 and not source._pending and not source._backlog
    exchange.replicas, exchange.from_rank0 = 2, lambda ask: ask()
    announce(run, list("01234567"), "rl", 32.0)  # 3, 5, 6 and 7 were never taken
    home = {name for name, sample in samples.items() if home_of(Request(sample, 32.0), 2) == 0}
    assert {key[0] for key in source._pending} == home and {key[0] for key in source._plans} == set("3567")
    source.reset()
    announce(run, list("0124"), "rl", 32.0)
    mine = divide(source, [Request(samples[name], 32.0) for name in "0124"], 2)[0]
    assert {key[0] for key in source._pending} == {"0124"[number] for number in mine} and len(mine) == 2
    source.close()


def read_differently(layout: ParallelConfig) -> list[str]:
    """Each rank failed on a clip of its own; what is left."""
    parallel.reinit(layout, seed=0)
    run = cast(Any, SimpleNamespace(exchange=(exchange := Exchange.join())))
    names = [name for name in "abcd" if name != "ad"[exchange.rank]]
    left = agreed(run, [Prompt(Sample(name, "success", ()), (1,)) for name in names])
    return [prompt.sample.id for prompt in left]


def test_ranks_of_a_replica_leave_out_what_one_of_them_could_not_read(pool2: RankPool) -> None:
    """Else one would answer for another prompt than its neighbour. Replicas of their own keep what they have."""
    tensor = ParallelConfig(tensor_model_parallel_size=2)
    assert pool2.run(read_differently, tensor) == [["b", "c"], ["b", "c"]]
    assert pool2.run(read_differently, ParallelConfig()) == [["b", "c", "d"], ["a", "b", "c"]]
