"""Packed rows against a plain reading of what they must be."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_mcore.data.balance import balance, imbalance
from dppo_mcore.data.errors import DataError
from dppo_mcore.data.packing import empty_batch, pack_conversations, pack_groups, sequence_cost
from dppo_mcore.data.qwen import Processor
from dppo_mcore.model.rope import mrope_positions
from dppo_mcore.types import FramePlan, PackedBatch, Prompt, PromptMedia, Sample, Turn


def prompt(processor: Processor, number: int, media: int, words: int, learnt: bool = False) -> Prompt:
    """A prompt with fake patches that carry its number."""
    qwen = processor.qwen
    ids: list[int] = [300 + number] * words
    plans = []
    for n in range(media):
        grid = (1 + n, 2, 4)
        ids += [qwen.vision_start_token_id] + [qwen.video_token_id] * (grid[0] * 2) + [qwen.vision_end_token_id, 7]
        plans.append(FramePlan(f"/{number}-{n}.mp4", "video", (0, 1) * grid[0], (0.0,), (28, 56), grid, 1.0))
    patches = [torch.full((plan.grid[0] * 8, 1176), 100.0 * number + n) for n, plan in enumerate(plans)]
    sample = Sample(f"s{number}", "exact", (Turn("user", "?"),), source=f"set{number % 2}")
    mask = tuple(n % 3 == 2 for n in range(len(ids))) if learnt else None
    return Prompt(sample, tuple(ids), tuple(PromptMedia(a, b) for a, b in zip(plans, patches, strict=True)), mask)


def groups(processor: Processor, count: int, seed: int = 0) -> tuple[list[Prompt], list[list[list[int]]]]:
    """Prompts with zero to two media and groups of one to five answers."""
    chance = random.Random(seed)
    prompts = [prompt(processor, n, n % 3, chance.randrange(3, 20)) for n in range(count)]

    def answer() -> list[int]:
        return [chance.randrange(10, 200) for _ in range(chance.randrange(1, 9))]

    return prompts, [[answer() for _ in range(chance.randrange(1, 6))] for _ in range(count)]


def sequences(row: PackedBatch) -> dict[tuple[str, int], slice]:
    """Loss rows of every sequence."""
    bounds = row.cu_rows.tolist()
    return {(ref.sample_id, ref.index): slice(bounds[n], bounds[n + 1]) for n, ref in enumerate(row.sequences)}


def seen_by(row: PackedBatch, at: int) -> list[int]:
    """Positions that position `at` attends to, as the contract says."""
    segment, branch = row.segments_L, row.branches_L
    before = torch.arange(len(segment)) <= at
    visible = before & (segment == segment[at]) & ((branch == 0) | (branch == branch[at]))
    return torch.nonzero(visible).flatten().tolist()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [60, 200, 10000])
def test_every_answer_reads_as_if_alone(processor: Processor, share: bool, budget: int) -> None:
    """Every loss row sees the prompt and its own answer so far, at their positions; its target is what follows."""
    prompts, answers = groups(processor, 9)
    advantages = [[float(10 * p + g) for g in range(len(group))] for p, group in enumerate(answers)]
    old = [
        [[p + g / 10 + t / 100 for t in range(len(a))] for g, a in enumerate(group)] for p, group in enumerate(answers)
    ]
    rows = pack_groups(prompts, answers, {"advantages": advantages, "old": old}, processor.qwen, budget, share, 8)
    found = set()
    for row in rows:
        assert row.token_ids_L.numel() % 8 == 0
        for (name, g), part in sequences(row).items():
            p = int(name[1:])
            found.add((p, g))
            own, answer = prompts[p], answers[p][g]
            grids = [media.plan.grid for media in own.media]
            positions = mrope_positions((*own.token_ids, *answer), grids, [1.0] * len(grids), processor.qwen)
            assert row.targets_R[part].tolist() == answer
            for t, at in enumerate(row.loss_rows_R[part].tolist()):
                seen = seen_by(row, at)
                assert row.token_ids_L[seen].tolist() == [*own.token_ids, *answer[:t]]
                assert torch.equal(row.position_ids_3L[:, seen], positions[:, : len(seen)])
            assert row.columns["advantages"][part].tolist() == [advantages[p][g]] * len(answer)
            assert row.columns["old"][part].numpy() == pytest.approx(np.float32(old[p][g]))
    assert found == {(p, g) for p, group in enumerate(answers) for g in range(len(group))}


def test_media_rows_follow_their_patches(processor: Processor) -> None:
    """The n-th media row of a packed row takes the n-th merged patch, whatever order prompts were packed in."""
    prompts, answers = groups(processor, 9, seed=3)
    for row in pack_groups(prompts, answers, None, processor.qwen, 120, True, 4):
        if row.patches_P is None:
            assert row.media_rows_M is None and not row.grids
            continue
        assert (row.token_ids_L[row.media_rows_M] == processor.qwen.video_token_id).all()
        assert len(row.media_rows_M) * 4 == len(row.patches_P) == sum(t * h * w for t, h, w in row.grids)
        owners = row.patches_P[::4, 0].div(100, rounding_mode="floor").long()
        words = [next(ref for ref in row.token_ids_L[row.segments_L == s].tolist() if ref >= 300) - 300
                 for s in row.segments_L[row.media_rows_M].tolist()]  # fmt: skip
        assert owners.tolist() == words and len(row.media_keys) == len(row.grids)


def test_sharing_lays_a_prompt_out_once(processor: Processor) -> None:
    """One copy per group within the budget; a group beyond it is split, each part with the prompt."""
    one = prompt(processor, 1, 2, 30)
    answers = [[[5] * 10 for _ in range(8)]]
    size = len(one.token_ids)
    (row,) = pack_groups([one], answers, None, processor.qwen, 1000)
    assert row.token_ids_L.numel() == size + 80 and len(row.grids) == 2
    assert len(pack_groups([one], answers, None, processor.qwen, size + 20)) == 4
    alone = pack_groups([one], answers, None, processor.qwen, 1000, share=False)
    assert sum(row.token_ids_L.numel() for row in alone) == 8 * (size + 10)
    assert len(pack_groups([one], [[[5] * 500]], None, processor.qwen, 100)) == 1


def test_limits_on_groups(processor: Processor) -> None:
    """`max_groups` prompts per row; a row of padding has no loss rows."""
    prompts, answers = groups(processor, 7)
    assert len(pack_groups(prompts, answers, None, processor.qwen, 10**6, max_groups=1)) == 7
    assert len(pack_groups(prompts, answers, None, processor.qwen, 10**6, max_groups=3)) == 3
    empty = empty_batch(8, ("a",))
    assert empty.token_ids_L.numel() == 8 and (empty.segments_L == -1).all() and len(empty.columns["a"]) == 0


def test_indices_name_the_answers_left(processor: Processor) -> None:
    """Where answers of a group were dropped, the others keep their numbers."""
    one = prompt(processor, 1, 0, 5)
    (row,) = pack_groups([one], [[[1], [2]]], None, processor.qwen, 100, indices=[[3, 6]])
    assert [ref.index for ref in row.sequences] == [3, 6]


def test_conversations(processor: Processor) -> None:
    """Rows sit one before their targets, segments don't mix, sources are kept."""
    prompts = [prompt(processor, n, n % 2, 12, learnt=True) for n in range(6)]
    weights = [float(n) for n in range(6)]
    rows = pack_conversations(prompts, processor.qwen, 60, 4, {"weights": weights})
    assert sorted(ref.sample_id for row in rows for ref in row.sequences) == [f"s{n}" for n in range(6)]
    for row in rows:
        for (name, _), part in sequences(row).items():
            own = prompts[int(name[1:])]
            at = row.loss_rows_R[part]
            assert torch.equal(row.token_ids_L[at + 1], row.targets_R[part])
            assert row.targets_R[part].tolist() == [t for t, m in zip(own.token_ids, own.loss_mask, strict=True) if m]
            assert row.columns["weights"][part].unique().tolist() == [float(name[1:])]
            last = int(at[-1])
            assert row.token_ids_L[seen_by(row, last)].tolist() == list(own.token_ids[: len(seen_by(row, last))])
        for ref in row.sequences:
            assert ref.source == f"set{int(ref.sample_id[1:]) % 2}"


def test_errors_name_the_sample(processor: Processor) -> None:
    """One line each."""
    bare = prompt(processor, 4, 0, 5)
    with pytest.raises(DataError, match="sample s4: has no token to learn"):
        pack_conversations([bare], processor.qwen, 100)
    with pytest.raises(DataError, match="sample s4: an answer without tokens"):
        pack_groups([bare], [[[]]], None, processor.qwen, 100)
    with pytest.raises(DataError, match="sample s4, answer 0: column old"):
        pack_groups([bare], [[[1, 2]]], {"old": [[[0.5]]]}, processor.qwen, 100)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 8), st.none() | st.integers(0, 99))
def test_balance(costs: list[int], ranks: int, homes_seed: int | None) -> None:
    """Every item once; never worse than 4/3 of the best bound, or 2% more for the sake of homes."""
    homes = None if homes_seed is None else random.Random(homes_seed).choices(range(ranks), k=len(costs))
    parts = balance(costs, ranks, homes)
    assert sorted(item for part in parts for item in part) == list(range(len(costs))) and len(parts) == ranks
    assert parts == balance(costs, ranks, homes)
    loads = [sum(costs[item] for item in part) for part in parts]
    in_order = sorted(costs, reverse=True)
    bound = max(sum(costs) / ranks, max(costs), sum(in_order[ranks - 1 : ranks + 1]) if len(costs) > ranks else 0)
    most = max(sum(costs[item] for item in part) for part in balance(costs, ranks))
    assert most <= 4 / 3 * bound + 1 and max(loads) <= most * (1 if homes is None else 1.02)
    assert imbalance(costs, parts) == pytest.approx(max(loads) * ranks / sum(costs))


def test_homes_give_way_to_balance() -> None:
    """Where going home would load a rank more than the division without homes does, nobody goes home."""
    costs, homes = [4, 7, 8, 5, 6, 8], [1, 0, 0, 0, 1, 0]
    assert balance(costs, 2, homes) == balance(costs, 2)


def test_what_comes_again_goes_home() -> None:
    """Of equal items in batches of 16, four in five or more go home, and every rank has as many all the same."""
    dice = random.Random(5)
    home = [dice.randrange(2) for _ in range(400)]
    went = []
    for _ in range(100):
        batch = dice.sample(range(400), 16)
        parts = balance([1.0] * 16, 2, [home[item] for item in batch])
        assert [len(part) for part in parts] == [8, 8]
        went += [home[batch[at]] == rank for rank, part in enumerate(parts) for at in part]
    assert sum(went) / len(went) > 0.8


def test_cost_counts_vision(processor: Processor) -> None:
    """A medium costs, and more of it costs more."""
    costs = [sequence_cost(prompt(processor, 0, media, 10), 40, processor.qwen) for media in range(3)]
    assert costs[0] < costs[1] < costs[2]
