"""What is written comes back exactly, once, whatever is written again; one writer; readers beside it; exports."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_mcore.practice import ledger_schema
from dppo_mcore.practice.ledger import BufferRow, Ledger, LedgerError, PhasePlan, SftItem, TeacherAnswer
from dppo_mcore.practice.ledger_export import export
from dppo_mcore.practice.ledger_rollouts import pack_ids, pack_logprobs, pack_text, unpack_numbers, unpack_text
from dppo_mcore.types import Media, Rollout, Sample, ScoredRollout, Turn

RL = "1-1 RL"
PLAN = [PhasePlan("1-1 buffer", 1, "buffer", 32.0), PhasePlan(RL, 1, "rl", 32.0), PhasePlan("1-2 SFT", 1, "sft", 32.0)]
SAMPLES = [
    Sample(
        f"s{i}",
        ("counting", "planning")[i % 2],
        (Turn("user", f"<video>How many? {i}"),),
        (Media("video", f"/clips/{i}.mp4", 0.5, None),),
        dimension="Temporal & Sequential",
        gold=[i, "x"],
        source="world",
    )
    for i in range(6)
]


def scored(sample_id: str, index: int, **changes: object) -> ScoredRollout:
    values: dict[str, object] = {
        "token_ids": (5, 151_000, 7),
        "logprobs": tuple(np.float32([-0.1, -2.7, -0.0]).tolist()),
        "text": f"answer {index} " * 30,
        "finish_reason": "stop",
        "weight_versions": ((3, 0, 2), (4, 2, 3)),
        **changes,
    }
    rollout = Rollout(sample_id, index, **values)  # type: ignore[arg-type]
    return ScoredRollout(rollout, 0.1 + 0.9 * (index % 2), {"format": 1.0, "task": float(index % 2)}, index % 2 == 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_samples(SAMPLES, "rl")
    ledger.plan(PLAN)
    return ledger


def test_rollouts_come_back_exactly(ledger: Ledger) -> None:
    odd = [
        scored("s0", 0, text=""),
        scored("s0", 1, text="short"),
        scored("s0", 2, text="\x00 half a pair \ud800 ½ 漢字" * 20),
        scored("s0", 3, token_ids=(), logprobs=()),
        scored("s0", 4, logprobs=(-0.1, math.pi, -1e-300)),
        scored("s0", 5, token_ids=(1, 2, 65535)),
        scored("s0", 6, finish_reason="length", weight_versions=()),
        scored("s0", 7, logprobs=(-math.inf, 0.0, -1.0)),
    ]
    error = ScoredRollout(scored("s1", 0).rollout, 0.0, {"format": 0.0, "task": 0.0}, False, "ValueError: no")
    assert ledger.record_rollouts(RL, 3, [*odd, error]) == 9
    groups = ledger.rollouts(RL, 3)
    assert groups == {"s0": odd, "s1": [error]}
    assert [row.scored for row in ledger.rollouts_of("s0")] == odd
    assert [row.scored for row in ledger.all_rollouts(RL)] == [*odd, error]
    assert ledger.recorded(RL, 3) == {(o.rollout.sample_id, o.rollout.index) for o in [*odd, error]}
    assert ledger.rollouts(RL, 4) == {}


@given(
    st.text(alphabet=st.characters(), max_size=400),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=30),
    st.lists(st.floats(allow_nan=False), max_size=30),
)
def test_any_payload_packs_and_unpacks(text: str, ids: list[int], logprobs: list[float]) -> None:
    assert unpack_text(pack_text(text)) == text
    assert unpack_numbers(pack_ids(ids), len(ids), {2: "<u2", 4: "<i4"}) == tuple(ids)
    assert unpack_numbers(pack_logprobs(logprobs), len(logprobs), {4: "<f4", 8: "<f8"}) == tuple(logprobs)


def test_writing_again_changes_nothing(ledger: Ledger) -> None:
    first = [scored("s0", i) for i in range(4)]
    assert ledger.record_rollouts(RL, 0, first[:2]) == 2
    assert ledger.record_rollouts(RL, 0, first) == 2
    digest = ledger.digest()
    assert ledger.record_rollouts(RL, 0, [scored("s0", i, text="other") for i in range(4)]) == 0
    assert ledger.digest() == digest
    assert ledger.groups(RL) == [ledger.groups(RL)[0]]
    assert (ledger.groups(RL)[0].trials, ledger.groups(RL)[0].successes) == (4, 2)
    assert ledger.success_rates() == {"s0": (4, 2)}
    assert ledger.success_rates(["1-1 buffer"]) == {}
    assert ledger.task_histogram([RL], bins=2) == {"counting": [2, 2]}


def test_a_failed_transaction_leaves_nothing(ledger: Ledger) -> None:
    digest = ledger.digest()
    with pytest.raises(LedgerError, match="sample 'nobody' is not in"):
        ledger.record_rollouts(RL, 0, [scored("s0", 0), scored("nobody", 0)])
    with pytest.raises(RuntimeError), ledger.transaction():
        ledger.record_rollouts(RL, 0, [scored("s0", 0)])
        ledger.decide(RL, 0, "stop", {}, "")
        raise RuntimeError
    assert ledger.digest() == digest


def test_phases(ledger: Ledger) -> None:
    assert [p.state for p in ledger.phases()] == ["planned"] * 3
    assert ledger.start_phase(RL, 0) and not ledger.start_phase(RL, 5)
    ledger.set_cursor(RL, {"step": 7, "epoch": 1})
    ledger.plan([*PLAN, PhasePlan("2-1 RL", 2, "rl", 64.0)])
    assert ledger.phase(RL).cursor == {"step": 7, "epoch": 1}
    assert ledger.finish_phase(RL, 140, "S = 0.72") and not ledger.finish_phase(RL, 141, "again")
    row = ledger.phase(RL)
    assert (row.state, row.start_step, row.end_step, row.reason) == ("done", 0, 140, "S = 0.72")
    assert [p.name for p in ledger.phases()] == ["1-1 buffer", RL, "1-2 SFT", "2-1 RL"]
    with pytest.raises(LedgerError, match="not in the plan"):
        ledger.start_phase("9-1 RL", 0)


def test_samples(ledger: Ledger) -> None:
    assert ledger.add_samples(SAMPLES, "rl") == 0
    row = ledger.samples()["s1"]
    assert (row.gold, row.media[0]["path"], row.question) == ([1, "x"], "/clips/1.mp4", "<video>How many? 1")
    with pytest.raises(LedgerError, match="sample 's0' of pool 'eval' differs"):
        ledger.add_samples([Sample("s0", "exact", (Turn("user", "another"),))], "eval")


def test_a_sample_is_the_same_by_its_media_too(ledger: Ledger) -> None:
    """Another root is the same sample, as another pool is; another clip or window is another sample."""
    (medium,) = SAMPLES[0].media
    moved = replace(SAMPLES[0], media=(replace(medium, path="/elsewhere/clips/0.mp4"),))
    assert ledger.add_samples([moved], "rl") == ledger.add_samples([SAMPLES[0]], "eval") == 0
    for other in (replace(medium, path="/clips/7.mp4"), replace(medium, end=3.0), replace(medium, kind="image")):
        with pytest.raises(LedgerError, match=r"'s0' of pool 'rl' differs from the one .*\(media\): give it an id"):
            ledger.add_samples([replace(SAMPLES[0], media=(other,))], "rl")


def test_the_rest_of_the_facts(ledger: Ledger) -> None:
    assert ledger.decide(RL, 140, "stagnation", {"score": 0.72}, "S = 0.72: counting 0.91")
    assert not ledger.decide(RL, 140, "stagnation", {"score": 0.1}, "other")
    assert ledger.decisions("stagnation")[0].numbers == {"score": 0.72}
    assert ledger.decisions(phase="1-2 SFT") == []
    ledger.record_buffer(RL, [BufferRow("s0", "kept", 4, 2), BufferRow("s1", "mastered", 4, 4)])
    assert ledger.buffer(RL)[1] == BufferRow("s1", "mastered", 4, 4)
    answers = [TeacherAnswer("s2", 0, i, "big", "text", 1.0, True, False, None, 12) for i in range(3)]
    assert ledger.record_teacher("1-2 SFT", answers) == 3
    assert ledger.record_teacher("1-2 SFT", answers) == 0
    ledger.keep_teacher("1-2 SFT", [("s2", 0, 1)])
    assert [a.kept for a in ledger.teacher_answers("1-2 SFT", "s2")] == [False, True, False]
    items = [SftItem(0, "s2", "weak", "text", 12, "success rate 0")]
    ledger.record_corpus("1-2 SFT", items)
    assert ledger.corpus("1-2 SFT") == items
    ledger.record_evaluation(RL, 140, "held-out", {"success": 0.5}, [scored("s3", 1)])
    assert ledger.evaluations()[0].metrics == {"success": 0.5}
    assert ledger.evaluation_answers(RL, 140, "held-out")[0]["parts"] == {"format": 1.0, "task": 1.0}
    assert ledger.quarantine("/clips/9.mp4", "s4", "truncated") and not ledger.quarantine("/clips/9.mp4", "s4", "x")
    assert ledger.quarantined() == {"/clips/9.mp4": "truncated"}


def test_verified_is_the_newest_shortest_well_formed_answer(ledger: Ledger) -> None:
    assert ledger.verified("s0") is None
    ledger.record_rollouts(RL, 0, [scored("s0", 1, text="old", token_ids=(1,), logprobs=(0.0,))])
    ledger.record_rollouts(RL, 5, [scored("s0", 1, text="long"), scored("s0", 3, text="cut", finish_reason="length")])
    ledger.record_rollouts(RL, 5, [scored("s0", 5, text="brief", token_ids=(1, 2), logprobs=(0.0, 0.0))])
    assert ledger.verified("s0") == ("brief", RL, 5)


def test_another_threshold_afterwards(ledger: Ledger) -> None:
    values = [0.2, 0.4, 0.6]
    rows = [
        ScoredRollout(scored("s0", i).rollout, v, {"format": 1.0, "task": v}, v >= 0.5) for i, v in enumerate(values)
    ]
    ledger.record_rollouts(RL, 0, rows)
    assert ledger.success_rates() == {"s0": (3, 1)}
    ledger.rethreshold(0.4)
    assert ledger.success_rates() == {"s0": (3, 2)}


def test_tokens_of_finished_phases_can_be_dropped(ledger: Ledger) -> None:
    ledger.record_rollouts(RL, 0, [scored("s0", 0)])
    assert ledger.drop_tokens(RL) == 1
    again = ledger.rollouts(RL, 0)["s0"][0]
    assert again.rollout.token_ids == () and again.rollout.text == scored("s0", 0).rollout.text


def test_digest_sees_every_fact_but_not_the_time(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other.sqlite")
    other.add_samples(SAMPLES, "rl")
    other.plan(PLAN)
    for one in (ledger, other):
        one.start_phase(RL, 0)
        one.record_rollouts(RL, 0, [scored("s0", 0)])
    assert ledger.digest() == other.digest()
    assert ledger.digest(ignore_times=False) != other.digest(ignore_times=False)
    other.record_rollouts(RL, 0, [scored("s0", 1, logprobs=(-0.1, -2.7, -0.1))])
    ledger.record_rollouts(RL, 0, [scored("s0", 1, logprobs=(-0.1, -2.7, -0.2))])
    assert ledger.digest() != other.digest()


def test_one_writer_many_readers(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="already open for writing in this process"):
        Ledger(ledger.path)
    program = f"from dppo_mcore.practice.ledger import Ledger; Ledger({str(ledger.path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "is being written by process" in done.stderr
    with Ledger(ledger.path, write=False) as reader:
        ledger.record_rollouts(RL, 0, [scored("s0", 0)])
        assert len(reader.rollouts(RL, 0)["s0"]) == 1
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.decide(RL, 0, "x", {}, "")
    ledger.close()
    Ledger(ledger.path).close()


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger(tmp_path / "none.sqlite", write=False)


def test_a_reader_may_come_while_the_file_is_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    sqlite3.connect(path).close()
    path.touch()
    maker = threading.Timer(0.3, lambda: Ledger(path).close())
    maker.start()
    with Ledger(path, write=False) as reader:
        assert reader.phases() == []
    maker.join()
    monkeypatch.setattr(ledger_schema, "BIRTH_S", 0.1)
    (tmp_path / "other.sqlite").touch()
    with pytest.raises(LedgerError, match="no such table: meta.*is it a run's ledger"):
        Ledger(tmp_path / "other.sqlite", write=False)


def test_network_file_systems_get_a_rollback_journal_and_an_exclusive_lock(tmp_path: Path) -> None:
    assert ledger_schema.is_network("nfs4") and ledger_schema.is_network("fuse.sshfs")
    assert not ledger_schema.is_network(ledger_schema.file_system(tmp_path / "x"))
    ledger = Ledger(tmp_path / "ledger.sqlite", file_system="lustre")
    ledger.add_samples(SAMPLES, "rl")
    assert ledger.connection.execute("PRAGMA journal_mode").fetchone()[0] == "truncate"
    assert not (tmp_path / "ledger.sqlite-wal").exists()
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        sqlite3.connect(tmp_path / "ledger.sqlite", timeout=0.1).execute("SELECT * FROM samples")
    with pytest.raises(LedgerError, match="can't be read now .*locked"):
        Ledger(tmp_path / "ledger.sqlite", write=False, file_system="lustre")
    ledger.backup(tmp_path / "copy.sqlite")
    with Ledger(tmp_path / "copy.sqlite", write=False) as copy:
        assert len(copy.samples()) == len(SAMPLES)
    assert ledger.publish() == tmp_path / "ledger.copy.sqlite" == ledger.publish()
    with Ledger(tmp_path / "ledger.copy.sqlite", write=False) as copy:
        assert len(copy.samples()) == len(SAMPLES)
    assert not list(tmp_path.glob(".*"))


def test_a_ledger_that_readers_can_open_is_not_copied(ledger: Ledger) -> None:
    assert ledger.publish() is None and not list(ledger.path.parent.glob("*copy*"))


def test_exports(ledger: Ledger, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    ledger.record_rollouts(RL, 0, [scored("s0", i) for i in range(3)])
    ledger.decide(RL, 0, "stagnation", {"score": 0.72}, "why")
    export(ledger, tmp_path / "jsonl")
    rows = [json.loads(line) for line in (tmp_path / "jsonl" / "rollouts.jsonl").read_text().splitlines()]
    assert rows[1]["token_ids"] == [5, 151_000, 7] and rows[1]["phase"] == RL and rows[1]["sample"] == "s0"
    assert rows[1]["logprobs"] == list(scored("s0", 0).rollout.logprobs)
    export(ledger, tmp_path / "parquet", form="parquet")
    table = pq.read_table(tmp_path / "parquet" / "rollouts.parquet").to_pylist()
    assert table[1]["token_ids"] == [5, 151_000, 7] and json.loads(table[0]["parts"])["task"] == 0.0
    assert pq.read_table(tmp_path / "parquet" / "samples.parquet").num_rows == len(SAMPLES)
    with pytest.raises(ValueError, match="unknown tables"):
        export(ledger, tmp_path, tables=["nonesuch"])
