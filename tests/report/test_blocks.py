"""The file's size is kept, what is left out is chosen and told, and questions are searched beyond their beginning."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dppo_mcore.practice.ledger import Ledger, PhasePlan
from dppo_mcore.report.blocks import SEARCHED, SNIPPET, Limits, SampleBlocks, sample_blocks
from dppo_mcore.report.packing import BLOCK_CHARACTERS, WRAPPING, Packer
from dppo_mcore.report.page import build
from dppo_mcore.report.read import open_run
from dppo_mcore.types import Rollout, Sample, ScoredRollout, Turn
from tests.report.synthetic import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("blocks") / "run", rollouts=2400, clips=12)


def blocks_of(folder: Path, limits: Limits) -> SampleBlocks:
    opened = open_run(folder)
    try:
        return sample_blocks(opened, limits)
    finally:
        opened.close()


def raw(block: str) -> str:
    return gzip.decompress(base64.b64decode(block)).decode()


def noise(characters: int, seed: int) -> str:
    """Text that compression can't make much shorter."""
    return "".join(chr(97 + k) for k in np.random.default_rng(seed).integers(0, 26, characters))


def test_blocks_stay_within_their_room_and_use_it() -> None:
    for room in (0, 1000, 30_000, 250_000, 10**7):
        packer = Packer(room)
        for key in range(300):
            packer.add(key, noise(2000, key))
        packer.flush()
        used = sum(len(block) + WRAPPING for block in packer.blocks)
        assert used <= room and (packer.full or len(packer.number) == 300)
        assert not packer.full or used > room - 3000
        for number, block in enumerate(packer.blocks):
            assert all(f'"{key}":"' in raw(block) for key, of in packer.number.items() if of == number)


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
def test_the_whole_file_stays_within_its_bound(share: float, run: Path) -> None:
    whole = len(build(run, Limits(frame_samples=40)).encode())
    bound = share * whole / 1e6
    page = build(run, Limits(frame_samples=40, megabytes=bound))
    assert 0.9 * bound <= len(page.encode()) / 1e6 <= bound
    assert '"bare":0' not in page or "without pictures for --max-megabytes: " in page


def test_held_out_and_taught_samples_keep_their_details_longest(run: Path) -> None:
    whole = blocks_of(run, Limits(frame_samples=0))
    size = sum(map(len, whole.blocks)) / 1e6
    assert whole.bare == whole.rollouts_older == 0 and whole.rollouts_shown == whole.rollouts_total
    for share in (0.3, 0.6, 0.9):
        found = blocks_of(run, Limits(frame_samples=0, megabytes=share * size + 0.02))
        pools = found.index["words"]["pool"]
        ranks = [
            0 if pools[pool] != "rl" else 1 if taught else 2 if learnt else 3
            for pool, taught, learnt in zip(
                found.index["pool"], found.index["teacher"], found.index["corpus"], strict=True
            )
        ]
        kept = [rank for rank, block in zip(ranks, found.index["block"], strict=True) if block >= 0]
        left = [rank for rank, block in zip(ranks, found.index["block"], strict=True) if block < 0]
        assert kept and left and max(kept) <= min(left) + 1 and len(left) == found.bare
        assert sum(rank == 0 for rank in kept) == 240 or max(kept) == 0
        assert found.rollouts_older == 0 and len(found.keys) == len(whole.keys)


def test_older_rollouts_and_details_are_counted_apart(run: Path) -> None:
    newest = blocks_of(run, Limits(rollouts=200, frame_samples=0))
    assert (newest.rollouts_shown, newest.rollouts_older, newest.bare) == (200, newest.rollouts_total - 200, 0)
    both = blocks_of(run, Limits(rollouts=200, megabytes=0.08, frame_samples=0))
    assert both.rollouts_older == newest.rollouts_older and both.bare > 0 and both.rollouts_shown < 200
    assert sum(both.index["rollouts"]) == 200


def test_a_block_is_weighed_by_all_its_answers(tmp_path: Path) -> None:
    """Held-out answers alone: many, long, and no rollout."""
    names = [f"eval {k}" for k in range(60)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_samples([Sample(name, "exact", (Turn("user", "?"),)) for name in names], "eval")
        ledger.plan([PhasePlan("1-1 RL", 1, "rl")])
        answers = [Rollout(name, 0, (1,), (-0.1,), noise(15_000, k), "stop", ((1, 0, 1),))
                   for k, name in enumerate(names)]  # fmt: skip
        scored = [ScoredRollout(answer, 1.0, {"task": 1.0}, True, None) for answer in answers]
        for step in range(3):
            ledger.record_evaluation("1-1 RL", step, "eval", {}, scored)
    found = blocks_of(tmp_path, Limits())
    assert len(found.blocks) >= 6
    assert max(len(raw(block)) for block in found.blocks) < BLOCK_CHARACTERS + 60_000


def test_a_question_is_searched_beyond_its_snippet(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_samples([Sample(f"s{k}", "exact", (Turn("user", noise(3000, k)),)) for k in range(50)], "rl")
        ledger.plan([PhasePlan("1-1 RL", 1, "rl")])
        answers = [Rollout(f"s{k}", 0, (1,), (-0.1,), "!", "stop", ((1, 0, 1),)) for k in range(50)]
        ledger.record_rollouts("1-1 RL", 0, [ScoredRollout(one, 1.0, {"task": 1.0}, True, None) for one in answers])
    for megabytes, characters in ((150, SEARCHED), (0.1, 400), (0.001, SNIPPET)):
        questions = blocks_of(tmp_path, Limits(megabytes=megabytes)).index["question"]
        assert {len(question) for question in questions} == {characters}


def test_pictures_are_of_samples_with_details(run: Path) -> None:
    page = build(run, Limits(frame_samples=40, megabytes=0.25))
    index = re.search(r'id="samples-index">([^<]*)<', page)
    data = re.search(r'"pictures":\{([^}]*)\}', page)
    assert index and data
    bare = {place for place, block in enumerate(json.loads(raw(index.group(1)))["block"]) if block < 0}
    pictured = {int(place) for place in re.findall(r'"(\d+)":', data.group(1))}
    assert bare and pictured and not bare & pictured
