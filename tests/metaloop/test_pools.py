"""Several manifests of one run: whose ids are whose, and what is wrong with them before a model is built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dppo_mcore.data.manifest import Manifest
from dppo_mcore.metaloop.pools import check_ids, check_objectives, names_of, open_pools, remarks
from dppo_mcore.practice.ledger import Ledger
from dppo_mcore.rewards import registry
from dppo_mcore.runtime.errors import UserError
from tests.metaloop import harness

ALONE: Any = SimpleNamespace(rank=0, barrier=lambda: None)


def row(question: str = "How many?", clip: str = "clips/1.mp4", **changes: Any) -> dict[str, Any]:
    return {"video": clip, "messages": [{"role": "user", "content": question}], "gold": "3", **changes}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(**files: str) -> dict[str, Manifest]:
    return open_pools({name.replace("_", "-"): file for name, file in files.items()}, "", ALONE)


def test_rows_without_ids_of_two_files_of_one_name(tmp_path: Path) -> None:
    """The same words about other clips: each keeps its own, and a pool without a namesake keeps its ids."""
    pools = opened(
        rl=write(tmp_path / "a" / "pool.jsonl", row()),
        eval=write(tmp_path / "a" / "held_out.jsonl", row(), row("Which?")),
        eval_general=write(tmp_path / "b" / "held_out.jsonl", row(), row("Why?")),
    )
    check_ids(pools)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for name, manifest in pools.items():
            ledger.add_samples(manifest, name)
        found = {name: (sample.pool, sample.media[0]["path"]) for name, sample in ledger.samples().items()}
    assert found == {
        "pool:1": ("rl", str(tmp_path / "a" / "clips" / "1.mp4")),
        "held_out:1": ("eval", str(tmp_path / "a" / "clips" / "1.mp4")),
        "held_out:2": ("eval", str(tmp_path / "a" / "clips" / "1.mp4")),
        "eval-general/held_out:1": ("eval-general", str(tmp_path / "b" / "clips" / "1.mp4")),
        "eval-general/held_out:2": ("eval-general", str(tmp_path / "b" / "clips" / "1.mp4")),
    }


def test_names_of_files_given_twice() -> None:
    files = {"rl": "x/a.jsonl", "general": "y/a.jsonl", "base": "x/../x/a.jsonl", "eval": "b.jsonl"}
    assert names_of(files) == {"rl": "a", "general": "general/a", "base": "a", "eval": "b"}


@pytest.mark.parametrize(
    ("other", "differ"),
    [
        (row("How many now?"), "question"),
        (row(objective="exact", gold="4"), "objective and gold"),
        (row(clip="clips/2.mp4"), "media"),
        (row(end=2.0), "media"),
    ],
)
def test_one_id_for_two_samples_is_refused(tmp_path: Path, other: dict[str, Any], differ: str) -> None:
    """In one line with both pools and the id."""
    pools = opened(
        rl=write(tmp_path / "pool.jsonl", row("first", id="x"), row(id="q1")),
        eval=write(tmp_path / "eval.jsonl", {**other, "id": "q1"}),
    )
    with pytest.raises(UserError) as caught:
        check_ids(pools)
    assert str(caught.value) == (
        f"id 'q1' stands for two samples ({differ} differ): in pool rl ({tmp_path}/pool.jsonl) and in pool eval "
        f"({tmp_path}/eval.jsonl); ids hold for all manifests of a run, so give one of the two another id"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "id 'q1' stands for two samples"),
        (
            {"objective": "countin"},
            "pool eval ({}): no scorer for objective 'countin' (1 rows, did you mean counting?)",
        ),
        ({"video": "../1.mp4"}, "pool eval: {} has no usable row (1 refused, the first: {}:1: media path"),
    ],
    ids=["ids", "objectives", "rows"],
)
def test_a_refused_run_keeps_nothing_of_its_manifests(
    tiny_dir: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """One line, and a mended id will not be beside the old one in the ledger of the same run folder."""
    data = write(tmp_path / "pool.jsonl", row(id="q1"))
    held_out = write(tmp_path / "eval.jsonl", row("How many now?", id="q1") | change)
    command = [sys.executable, "-W", "ignore", "-m", "dppo_mcore.train", "--model", tiny_dir, "--data", data]
    command += ["--eval-data", held_out, "--run-folder", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=harness.environment(), cwd=harness.ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: " + message.replace("{}", held_out)), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        assert ledger.samples() == {}


def test_one_sample_in_two_pools(tmp_path: Path) -> None:
    """By way of the same folder, of a copy of it, or of one whose files are missing; other contents are refused."""
    first = write(tmp_path / "a" / "pool.jsonl", row(id="q1"))
    check_ids(opened(rl=first, base=first, eval=write(tmp_path / "a" / "eval.jsonl", row(id="q1", answer="three"))))
    copied = opened(rl=first, eval=write(tmp_path / "b" / "eval.jsonl", row(id="q1")))
    check_ids(copied)
    for folder in ("a", "b"):
        (tmp_path / folder / "clips").mkdir()
        (tmp_path / folder / "clips" / "1.mp4").write_bytes(b"same")
        check_ids(copied)
    (tmp_path / "b" / "clips" / "1.mp4").write_bytes(b"else")
    with pytest.raises(UserError, match="'q1' stands for two samples .media differ"):
        check_ids(copied)


def test_a_manifest_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pool.json").write_text('[{"id": 1}')
    with pytest.raises(UserError, match="pool.json: element 2 is not JSON"):
        opened(rl=str(tmp_path / "pool.json"))


def test_a_manifest_without_a_usable_row(tmp_path: Path) -> None:
    """Refused rows are counted and the first one's reason is given; an empty file is called empty."""
    path = write(tmp_path / "pool.jsonl", row(clip="../1.mp4"), row(gold="4", clip="/etc/1.mp4"))
    with pytest.raises(UserError, match=r"pool rl: .*pool.jsonl has no usable row \(2 refused, the first: .*:1: media"):
        opened(rl=path)
    with pytest.raises(UserError, match=r"pool eval: .*eval.jsonl has no usable row \(empty\)"):
        opened(eval=write(tmp_path / "eval.jsonl"))


def test_objectives_need_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked does, one's own by a file; what is only learnt doesn't."""
    monkeypatch.setattr(registry, "_SCORERS", dict(registry._SCORERS))
    file = tmp_path / "own.py"
    file.write_text("from dppo_mcore.rewards import objective\n\n@objective('shade')\ndef shade(sample, answer):\n"
                    "    return 1.0\n")  # fmt: skip
    learnt = write(tmp_path / "base.jsonl", row(objective="caption"))
    held_out = write(tmp_path / "eval.jsonl", row(objective="shade"), row(objective="shade"), row(objective="exact"))
    pools = opened(rl=write(tmp_path / "pool.jsonl", row()), general=learnt, base=learnt, eval_general=held_out)
    with pytest.raises(UserError) as caught:
        check_objectives(pools, "")
    assert str(caught.value).startswith(
        f"pool eval-general ({held_out}): no scorer for objective 'shade' (2 rows); known: affordance, boxes, "
    )
    check_objectives(pools, str(file))
    with pytest.raises(UserError, match="pool rl .*no scorer for objective 'caption' .1 rows.; known:"):
        check_objectives(opened(rl=learnt), str(file))


def test_what_the_first_rows_leave_out_is_said(tmp_path: Path) -> None:
    """Of an ordered held-out manifest, whose tail an evaluation never asks."""
    rows = [row(objective=name, source=source) for name, source in (("exact", "a"), ("boxes", "a"), ("boxes", "b"))]
    pools = opened(rl=write(tmp_path / "pool.jsonl", *rows), eval=write(tmp_path / "eval.jsonl", *rows, *rows[1:]))
    assert remarks(pools, 0) == remarks(pools, 3) == remarks(pools, 9) == []
    assert remarks(pools, 1) == [
        "pool eval: the first 1 of 5 rows (eval_samples) have none of objective 'boxes' (4 rows) and none of source "
        "'b' (2 rows); shuffle the manifest, or take more of it"
    ]
    assert len(remarks(pools, 2)) == 1
    many = write(tmp_path / "many.jsonl", *(row(source=f"s{number}") for number in range(9)), row(clip="../x.mp4"))
    refused, left = remarks(opened(eval=many), 2)
    assert refused.startswith("pool eval: 1 row(s) refused, the first: ")
    assert "'s6' (1 rows) and 2 more; shuffle" in left
