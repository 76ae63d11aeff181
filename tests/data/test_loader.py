"""What comes next depends on seed and step only, wherever a run was killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_mcore.config import DataConfig
from dppo_mcore.data.ahead import PromptSource
from dppo_mcore.data.balance import balance
from dppo_mcore.data.errors import DataError
from dppo_mcore.data.loader import Batches, Order, divide, home_of
from dppo_mcore.data.messages import Request
from dppo_mcore.data.packing import pack_conversations, sequence_cost
from dppo_mcore.types import Media, PackedBatch, Prompt, Sample, Turn
from tests.data.clips import write_clip

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS = 6, 40


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    """40 conversations over twelve clips of different lengths, one of them damaged."""
    folder = tmp_path_factory.mktemp("clips")
    return make_requests(folder)


def make_requests(folder: Path) -> list[Request]:
    """Written once; a second call with the same folder finds the clips there."""
    made = []
    for number in range(40):
        path = folder / f"{number % 12}.mp4"
        if not path.exists():
            write_clip(path, frames=16 + 4 * (number % 12), size=(56, 56))
        if number % 12 == 11:
            path.write_bytes(b"")
        turns = (Turn("user", f"<video>Question {number}, is it done?"),)
        sample = Sample(f"s{number}", "success", turns, (Media("video", str(path)),), answer="yes" * (1 + number % 3))
        made.append(Request(sample, 32.0, sample.answer))
    return made


def make_batches(source: PromptSource, requests: list[Request], step: int = 0, **options: Any) -> Batches:
    """The batches of every test here."""
    return Batches(source, requests.__getitem__, len(requests), BATCH, seed=11, step=step, **options)


def fingerprint(source: PromptSource, prompts: list[Prompt]) -> str:
    """Of everything the packed rows of a batch hold."""
    digest = hashlib.blake2b(digest_size=8)
    for row in pack_conversations(prompts, source.processor.qwen, 400, 4):
        for tensor in tensors(row):
            digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(repr((row.sequences, row.grids)).encode())
    return digest.hexdigest()


def unbroken(source: PromptSource, requests: list[Request], steps: int) -> list[str]:
    """What comes when nothing is killed."""
    return [fingerprint(source, prompts) for prompts in make_batches(source, requests, steps=steps)]


def tensors(row: PackedBatch) -> list[torch.Tensor]:
    """A packed row's tensors."""
    found = [row.token_ids_L, row.position_ids_3L, row.segments_L, row.branches_L, row.loss_rows_R, row.targets_R]
    return [*found, row.cu_rows, *(extra for extra in (row.patches_P, row.media_rows_M) if extra is not None)]


def test_200_resume_points_give_the_unbroken_sequence(requests: list[Request], tiny_dir: str) -> None:
    """Thrown away after a few batches, 200 times over, and begun again at its step: always what would have come."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=0))
    whole = unbroken(source, requests, STEPS)
    assert len(set(whole)) == STEPS
    chance = random.Random(0)
    for _ in range(200):
        begin = chance.randrange(STEPS - 4)
        first = make_batches(source, requests, begin)
        found = [fingerprint(source, next(first)) for _ in range(chance.randrange(1, 3))]
        second = make_batches(source, requests, json.loads(json.dumps(first.step)))
        found += [fingerprint(source, next(second)) for _ in range(2)]
        assert found == whole[begin : begin + len(found)]


def test_workers_and_cache_change_nothing(requests: list[Request], tiny_dir: str) -> None:
    """Decoding in place, ahead in processes, from the cache or without one: the same batches."""
    found = []
    for data in (DataConfig(data_workers=0), DataConfig(data_workers=2, media_cache_mib=0), DataConfig(data_workers=1)):
        source = PromptSource(tiny_dir, data)
        found.append(unbroken(source, requests, 8))
        source.close()
    assert found[0] == found[1] == found[2]


def test_the_next_batch_is_decoded_meanwhile(requests: list[Request], tiny_dir: str) -> None:
    """One step ahead and no further; the last step announces nothing."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=1, decode_ahead=64, media_cache_mib=0))
    batches = make_batches(source, requests, steps=2)
    announced = {requests[item].key for item in Order(40, 11).slots(BATCH, BATCH)}
    next(batches)
    assert {*source._pending, *source._backlog} == announced
    next(batches)
    assert not source._pending and not source._backlog
    with pytest.raises(StopIteration):
        next(batches)
    source.close()


def test_shares_are_planned_ahead(requests: list[Request], tiny_dir: str) -> None:
    """A rank that divides finds the plans made by its workers, and divides as it would have without them."""
    source, alone = (PromptSource(tiny_dir, DataConfig(data_workers=n, media_cache_mib=0)) for n in (1, 0))
    asked: list[list[str]] = []

    def share(whole: Sequence[Request]) -> list[Request]:
        asked.append([request.sample.id for request in whole if request.key in source._plans])
        parts = divide(source, whole, 2)
        assert parts == divide(alone, whole, 2)
        return [whole[at] for at in parts[0]]

    batches = make_batches(source, requests, share=share, plans=True, steps=4)
    assert len(list(batches)) == 4 and not source._plans
    known = set()
    for step, found in enumerate(asked):
        wanted = [requests[item] for item in Order(40, 11).slots(step * BATCH, BATCH)]
        new = [request.sample.id for request in wanted if request.sample.media not in known]
        assert set(found) == (
            set(new) - {damaged.sample_id for damaged in source.quarantine.entries()} if step > 1 else set()
        )
        known |= {request.sample.media for request in wanted}
    source.close()


def test_a_step_s_requests_are_made_once(requests: list[Request], tiny_dir: str) -> None:
    """Though the step is planned, divided and loaded."""
    source, asked = PromptSource(tiny_dir, DataConfig(data_workers=0)), []

    def request(row: int) -> Request:
        asked.append(row)
        return requests[row]

    list(Batches(source, request, len(requests), BATCH, seed=11, plans=True, steps=4))
    assert asked == Order(40, 11).slots(0, 4 * BATCH)


def test_replicas_share_a_batch_without_overlap(requests: list[Request], tiny_dir: str) -> None:
    """Every usable sample of a global batch is in exactly one part; all replicas agree without talking."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=0))

    def share(rank: int) -> Callable[[Sequence[Request]], list[Request]]:
        return lambda whole: [whole[at] for at in divide(source, whole, 3)[rank]]

    replicas = [make_batches(source, requests, share=share(rank)) for rank in range(3)]
    for step in range(6):
        ids = [prompt.sample.id for batches in replicas for prompt in next(batches)]
        wanted = [requests[item].sample.id for item in Order(40, 11).slots(step * BATCH, BATCH)]
        damaged = {request.sample.id for request in requests if request.sample.media[0].path.endswith("11.mp4")}
        assert sorted(ids) == sorted(set(wanted) - damaged)


def test_divide_balances_cost(requests: list[Request], tiny_dir: str) -> None:
    """By FLOPs, nearly as well as if clips had no homes; damaged samples are in nobody's part."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=0))
    parts = divide(source, requests, 4)
    usable = [n for n in range(40) if n % 12 != 11]
    assert sorted(at for part in parts for at in part) == usable
    plans = [source.plan(requests[at]) for at in usable]
    costs = {at: sequence_cost(plan, len(plan.token_ids), source.processor.qwen)
             for at, plan in zip(usable, plans, strict=True)}  # fmt: skip
    homeless = balance([costs[at] for at in usable], 4)
    most = max(sum(costs[usable[place]] for place in part) for part in homeless)
    assert max(sum(costs[at] for at in part) for part in parts) <= 1.02 * most


def test_every_epoch_is_a_permutation() -> None:
    """Epochs differ, and batches may reach over their border."""
    order = Order(10, seed=3)
    whole = order.slots(0, 50)
    epochs = [whole[start : start + 10] for start in range(0, 50, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert order.slots(7, 9) == whole[7:16]


def test_a_window_shuffles_neighbours_only() -> None:
    order = Order(10, seed=3, window=4)
    epochs = [order.slots(start, 10) for start in range(0, 100, 10)]
    for epoch in epochs:
        assert [sorted(epoch[k : k + 4]) for k in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert Order(10, seed=3, window=1).slots(7, 6) == [7, 8, 9, 0, 1, 2]
    assert Order(10, seed=3, window=99).slots(0, 50) == Order(10, seed=3).slots(0, 50)


def test_nothing_to_learn_is_no_error(tiny_dir: str) -> None:
    """A loop that found no weakness runs zero steps; asking for one names the cause."""
    source = PromptSource(tiny_dir, DataConfig(data_workers=0))
    assert list(make_batches(source, [], steps=0)) == []
    with pytest.raises(DataError, match="list of samples is empty"):
        next(make_batches(source, []))


@pytest.mark.kill
def test_sigkill_at_random_instants(requests: list[Request], tiny_dir: str, tmp_path: Path) -> None:
    """A real process with decoding workers is killed again and again; the batches it wrote are the unbroken ones."""
    folder = Path(requests[0].sample.media[0].path).parent
    out = tmp_path / "batches.jsonl"
    chance = random.Random(1)
    kills = 0
    while True:
        script = [sys.executable, "-m", "tests.data.test_loader", str(folder), tiny_dir, str(out)]
        process = subprocess.Popen(script, cwd=ROOT)
        until = written_lines(out) + chance.randrange(1, 12)
        while process.poll() is None and written_lines(out) < until:
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        time.sleep(chance.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["batch"] for row in written] == unbroken(
        PromptSource(tiny_dir, DataConfig(data_workers=0)), requests, len(written)
    )


def written_lines(path: Path) -> int:
    """Whole lines so far."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_slowly(folder: Path, model: str, out: Path) -> None:
    """The killed process: writes each batch's fingerprint and the step after it."""
    requests = make_requests(folder)
    source = PromptSource(model, DataConfig(data_workers=1, media_cache_mib=0))
    lines = out.read_text().splitlines() if out.exists() else []
    batches = make_batches(source, requests, json.loads(lines[-1])["step"] if lines else 0, steps=STEPS)
    with open(out, "a") as file:
        for prompts in batches:
            file.write(json.dumps({"batch": fingerprint(source, prompts), "step": batches.step}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            time.sleep(0.1)
    source.close()


if __name__ == "__main__":
    run_slowly(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))


def test_a_clip_that_comes_again_goes_home(requests: list[Request], tiny_dir: str, tmp_path: Path) -> None:
    """Its rank is the same as the last time, also after the data set has moved, wherever balance allows it."""
    homes = {request.sample.media: home_of(request, 2) for request in requests}
    assert set(homes.values()) == {0, 1}
    for request in requests:
        (media,) = request.sample.media
        moved = replace(media, path="/elsewhere/" + "/".join(media.path.split("/")[-3:]))
        assert home_of(replace(request, sample=replace(request.sample, media=(moved,))), 2) == homes[(media,)]
    equal = []
    for number in range(8):
        (media,) = requests[0].sample.media
        copy = shutil.copy(media.path, tmp_path / f"copy-{number}.mp4")
        equal.append(replace(requests[0], sample=replace(requests[0].sample, media=(replace(media, path=str(copy)),))))
    parts = divide(PromptSource(tiny_dir, DataConfig(data_workers=0)), equal, 2)
    found = [home_of(request, 2) for request in equal]
    at_home = sum(found[at] == rank for rank, part in enumerate(parts) for at in part)
    assert [len(part) for part in parts] == [4, 4] and at_home == sum(min(found.count(rank), 4) for rank in (0, 1))
