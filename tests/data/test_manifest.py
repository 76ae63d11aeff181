"""Every accepted schema, every refusal with its line, random access by row and id."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from dppo_mcore.data.errors import DataError
from dppo_mcore.data.manifest import Manifest, read_manifest
from dppo_mcore.types import Media, Turn


def write(folder: Path, rows: list[Any], name: str = "pool.jsonl") -> Path:
    """Rows as JSONL (text rows go in as they are) or, for a .json name, as one array."""
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def only(folder: Path, row: dict[str, Any]) -> Any:
    """The one sample of a one-row manifest."""
    manifest = read_manifest(write(folder, [row]))
    assert not manifest.refused, manifest.refused[0]
    (sample,) = manifest
    return sample


def test_conversations_with_video_list(tmp_path: Path) -> None:
    """The first public schema."""
    sample = only(
        tmp_path,
        {"video": ["a/b.mp4"], "conversations": [{"role": "user", "content": "<video>Which?"},
                                                 {"role": "assistant", "content": "B"}]},
    )  # fmt: skip
    assert sample.media == (Media("video", str(tmp_path / "a" / "b.mp4")),)
    assert sample.turns == (Turn("user", "<video>Which?"),)
    assert (sample.answer, sample.gold, sample.objective, sample.id) == ("B", "B", "prediction", "pool:1")


def test_messages_with_images_anywhere(tmp_path: Path) -> None:
    """The second: several turns, markers in the text."""
    turns = [{"role": "user", "content": "See <image>"}, {"role": "assistant", "content": "[0.1, 0.2, 0.3, 0.4]"},
             {"role": "user", "content": "and <image> too"}, {"role": "assistant", "content": "ok"}]  # fmt: skip
    sample = only(tmp_path, {"messages": turns, "images": ["1.png", "2.png"], "id": 7})
    assert [media.path[-5:] for media in sample.media] == ["1.png", "2.png"]
    assert len(sample.turns) == 3 and sample.turns[1].role == "assistant" and sample.id == "7"


def test_wider_ecosystem(tmp_path: Path) -> None:
    """The third: plural keys, `from`/`value`, a single string for a list, order of markers kept."""
    turns = [{"from": "human", "value": "<image><video>What?"}, {"from": "gpt", "value": "yes"}]
    sample = only(tmp_path, {"conversations": turns, "videos": "v.mp4", "images": ["i.png"]})
    assert [media.kind for media in sample.media] == ["image", "video"]
    assert sample.objective == "success"


def test_video_without_marker_goes_first(tmp_path: Path) -> None:
    """The fourth; unknown keys end up with the scorer's extras."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"},
             {"role": "assistant", "content": "3"}]  # fmt: skip
    row = {"video": "v.mp4", "question_type": "count", "data_source": "vsi", "conversations": turns}
    sample = only(tmp_path, row)
    assert sample.turns[1].content == "<video>How many?"
    assert (sample.source, sample.objective, sample.extras) == ("vsi", "counting", {"question_type": "count"})


def test_own_schema_and_parts(tmp_path: Path) -> None:
    """Ours, with clip window, gold and extras; and OpenAI-style parts."""
    sample = only(
        tmp_path,
        {"id": "x", "objective": "affordance", "dimension": "Affordance & Function", "source": "lab",
         "media": [{"type": "video", "path": "v.mp4", "start": 1.5, "end": 9}],
         "messages": [{"role": "user", "content": "<video>Where?"}], "gold": [[0.1, 0.2]], "answer": "(0.1, 0.2)",
         "extras": {"polygon": [[0, 0], [1, 0], [1, 1]]}},
    )  # fmt: skip
    assert sample.media[0].start == 1.5 and sample.media[0].end == 9.0
    assert sample.gold == [[0.1, 0.2]] and sample.answer == "(0.1, 0.2)" and "polygon" in sample.extras
    parts = [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "Done?"}]
    sample = only(tmp_path, {"messages": [{"role": "user", "content": parts}]})
    assert sample.turns[0].content == "<video>Done?" and sample.media[0].kind == "video"


@pytest.mark.parametrize("keys", [("start", "end"), ("video_start", "video_end")])
def test_parts_have_windows(tmp_path: Path, keys: tuple[str, str]) -> None:
    """Each its own, with an image from a field between them."""
    parts = [{"type": "video", "video": "a.mp4", keys[0]: 1, keys[1]: 2.5}, {"type": "image"},
             {"type": "video", "video": "b.mp4", keys[1]: 9}]  # fmt: skip
    sample = only(tmp_path, {"messages": [{"role": "user", "content": parts}], "images": ["c.png"]})
    assert [(media.path[-5:], media.start, media.end) for media in sample.media] == [
        ("a.mp4", 1.0, 2.5), ("c.png", None, None), ("b.mp4", None, 9.0)
    ]  # fmt: skip


NAMED_PART = '{"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}'
REFUSED = {
    NAMED_PART + ']}], "start": 1}': "start, end: are for video and videos",
    NAMED_PART + ', {"type": "video"}]}], "videos": ["b.mp4"]}': "parts and fields of the row both name a video",
    NAMED_PART + ', {"type": "image", "image": "i.png", "end": 2}]}]}': "for a part that names a video",
    NAMED_PART[:-1] + ', "start": 3, "end": 2}]}]}': "content.end: 2 is not after start 3",
    '{"messages": [{"role": "user", "content": [{"type": "video", "end": 2}]}], "video": "v"}': "a part that names",
    '{"messages": [{"role": "user", "content": "?"}], "media": [{"type": "image", "path": "i", "end": 2}]}':
        "an image has no start",
    "{broken": "not JSON",
    "[1]": "must be a JSON object",
    '{"id": "a"}': "messages: missing",
    '{"messages": [{"role": "robot", "content": "x"}]}': "messages[0].role: unknown 'robot'",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "must end with a user turn",
    '{"messages": [{"role": "user", "content": "<video><video>?"}], "video": "v.mp4"}': "2 <video> but the row names 1",
    '{"messages": [{"role": "user", "content": "?"}], "video": "../v.mp4"}': "outside the media root",
    '{"messages": [{"role": "user", "content": "?"}], "video": "/etc/v.mp4"}': "outside the media root",
    '{"messages": [{"role": "user", "content": "?"}], "video": 3}': "media path must be non-empty text",
    '{"messages": [{"role": "user", "content": "?"}], "media": [{"type": "video", "path": "v", "start": 5, "end": 2}]}':
        "end: 2 is not after start 5",
    '{"messages": [{"role": "user", "content": "?"}], "answer": 5}': "answer: must be text",
    '{"id": "good", "messages": [{"role": "user", "content": "again"}]}': "taken by line 1",
}  # fmt: skip


def test_refusals_name_line_and_reason(tmp_path: Path) -> None:
    """Bad rows are counted, none silently dropped, and the good ones stay."""
    good = {"id": "good", "messages": [{"role": "user", "content": "?"}]}
    last = {"id": "last", "messages": [{"role": "user", "content": "?"}]}
    path = write(tmp_path, [good, *REFUSED, "", last])
    for _ in range(2):  # indexed, then from the index
        manifest = read_manifest(path)
        assert [sample.id for sample in manifest] == ["good", "last"]
        assert [row.line for row in manifest.refused] == list(range(2, 2 + len(REFUSED)))
        for row, reason in zip(manifest.refused, REFUSED.values(), strict=True):
            assert reason in row.reason and str(row).startswith(f"{path}:{row.line}: ")


QUESTION = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "B"}]
HOSTILE = {
    b'{"id": "\\ud800", "messages": [{"role": "user", "content": "?"}]}': "half of a surrogate pair",
    b'{"messages": [{"role": "user", "content": "\\udfff?"}]}': "half of a surrogate pair",
    b'{"id": "\xff", "messages": [{"role": "user", "content": "?"}]}': "not JSON",
    b'{"id": ' + b"9" * 5000 + b"}": "not JSON",
    b'{"video": "a\\u0000.mp4", "messages": [{"role": "user", "content": "?"}]}': "not the name of a file",
    b'{"video": "http://host/a.mp4", "messages": [{"role": "user", "content": "?"}]}': "not the name of a file",
    b'{"video": "file:///etc/a.mp4", "messages": [{"role": "user", "content": "?"}]}': "outside the media root",
    b'{"video": "b/../../a.mp4", "messages": [{"role": "user", "content": "?"}]}': "outside the media root",
    b'{"video": "a.mp4", "start": NaN, "messages": [{"role": "user", "content": "?"}]}': "must be seconds >= 0",
    b'{"video": "a.mp4", "end": 1e999, "messages": [{"role": "user", "content": "?"}]}': "must be seconds >= 0",
    b'{"video": [["a.mp4"]], "messages": [{"role": "user", "content": "?"}]}': "must be non-empty text",
    b'"text"': "must be a JSON object",
}


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_hostile_rows_cost_themselves_only(form: str, tmp_path: Path) -> None:
    """After a byte-order mark, with CRLF and letters of several bytes before them, in lines and in an array."""
    good = '{"id": "%s", "messages": [{"role": "user", "content": "Wörter"}]}'
    rows = [(good % "first").encode(), *HOSTILE, (good % "last").encode()]
    before, between, after = (b"", b"\r\n", b"\r\n") if form == "jsonl" else (b"\r\n[", b" ,\r\n", b"]\r\n")
    path = tmp_path / f"pool.{form}"
    path.write_bytes(b"\xef\xbb\xbf" + before + between.join(rows) + after)
    for _ in range(2):
        manifest = read_manifest(path)
        assert [sample.id for sample in manifest] == ["first", "last"] and manifest[1].turns[0].content == "Wörter"
        assert [row.line for row in manifest.refused] == list(range(2, 2 + len(HOSTILE)))
        for row, reason in zip(manifest.refused, HOSTILE.values(), strict=True):
            assert reason in row.reason


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    """A row that no parser can follow."""
    deep = '{"a": ' + "[" * 100000 + "]" * 100000 + "}"
    manifest = read_manifest(write(tmp_path, [deep, {"messages": [{"role": "user", "content": "?"}]}]))
    assert len(manifest) == 1 and "not JSON" in manifest.refused[0].reason


@pytest.mark.parametrize("text", ['[{"id": 1}', '[{"id": 1}, {"id": ]', '[{"id": 1}] tail'])
def test_a_broken_array_is_named(text: str, tmp_path: Path) -> None:
    """An array that was cut off cannot be read past its break, and is not taken for a short one."""
    (tmp_path / "pool.json").write_text(text)
    with pytest.raises(DataError, match="pool.json: element 2 is not JSON"):
        read_manifest(tmp_path / "pool.json")


def test_null_is_as_good_as_absent(tmp_path: Path) -> None:
    """Tables write a null wherever a row lacks a column."""
    parts = [{"type": "video", "video": None, "text": None}, {"type": "text", "text": "?"}]
    sample = only(
        tmp_path,
        {"id": None, "messages": None, "video": None, "images": None, "videos": ["a.mp4"], "gold": None, "extras": None,
         "conversations": [{"role": None, "from": "human", "content": None, "value": parts},
                           {"role": "assistant", "from": None, "content": "B", "value": None}]},
    )  # fmt: skip
    assert (sample.gold, sample.objective, sample.turns[0].content) == ("B", "prediction", "<video>?")


def test_large_rows_and_arrays(tmp_path: Path) -> None:
    """Ten megabytes in one row; ten thousand elements in no more than their own time."""
    sample = only(tmp_path, {"video": "a.mp4", "messages": QUESTION, "extras": {"mask": "x" * 10**7}})
    assert len(sample.extras["mask"]) == 10**7
    rows = [{"id": f"r{n}", "messages": QUESTION, "video": f"{n}.mp4"} for n in range(10000)]
    manifest = read_manifest(write(tmp_path, rows, "large.json"))
    assert manifest.get("r9876").media[0].path.endswith("/9876.mp4")


def test_json_array_and_unicode(tmp_path: Path) -> None:
    """Elements of an array are found by their bytes, whatever the letters before them."""
    rows = [{"id": f"数{n}", "messages": [{"role": "user", "content": "Wörter " * n}]} for n in range(5)]
    manifest = read_manifest(write(tmp_path, rows, "pool.json"))
    assert [sample.id for sample in manifest] == [row["id"] for row in rows]
    assert manifest.get("数3").turns[0].content == "Wörter " * 3
    assert manifest[-1].id == "数4" and [sample.id for sample in manifest[1:3]] == ["数1", "数2"]


def test_lookup_labels_and_reindexing(tmp_path: Path) -> None:
    """Ids and labels without reading rows; a changed file is indexed again."""
    rows = [{"id": f"r{n}", "objective": ("boxes", "exact")[n % 2], "messages": [{"role": "user", "content": "?"}]}
            for n in range(100)]  # fmt: skip
    path = write(tmp_path, rows)
    manifest = read_manifest(path)
    assert manifest.index_of("r42") == 42 and manifest.label(42, "objective") == "boxes"
    assert manifest.counts("objective") == {"boxes": 50, "exact": 50}
    assert manifest.get("r42") is manifest.get("r42") == manifest[42]
    with pytest.raises(KeyError):
        manifest.get("r100")
    with open(path, "a") as file:
        file.write(json.dumps({**rows[0], "id": "r100"}) + "\n")
    os.utime(path, (time.time() + 5, time.time() + 5))
    assert read_manifest(path).get("r100").id == "r100"


def test_a_name_for_ids_and_what_two_manifests_share(tmp_path: Path) -> None:
    """Rows without an id are found by the given name, from an index of their own."""
    question = [{"role": "user", "content": "?"}]
    (tmp_path / "a").mkdir()
    rows = [{"messages": question}, {"id": "own", "messages": question}, {"id": "only here", "messages": question}]
    one = read_manifest(write(tmp_path, rows))
    path = write(tmp_path / "a", rows[:2])
    for name, ids, shared in (
        ("", ["pool:1", "own"], ["own", "pool:1"]),
        ("eval/pool", ["eval/pool:1", "own"], ["own"]),
    ):
        for _ in range(2):
            other = read_manifest(path, name=name)
            assert [sample.id for sample in other] == ids and all(other.get(name).id == name for name in ids)
        pairs = sorted((mine.id, theirs.id) for mine, theirs in one.shared(other))
        assert pairs == [(name, name) for name in shared]


def test_get_remembers_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go, and a copy sent to another process takes none along."""
    monkeypatch.setattr("dppo_mcore.data.manifest.RECENT", 3)
    rows = [{"id": f"r{n}", "objective": "exact", "messages": [{"role": "user", "content": "?"}]} for n in range(9)]
    manifest = read_manifest(write(tmp_path, rows))
    assert [manifest.get(f"r{n}").id for n in range(9)] == [f"r{n}" for n in range(9)]
    assert list(manifest._recent) == ["r6", "r7", "r8"]
    copy = pickle.loads(pickle.dumps(manifest))
    assert not copy._recent and copy.get("r0").id == "r0"


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    """One line that says which file."""
    with pytest.raises(DataError, match="nothing.jsonl: no such manifest"):
        read_manifest(tmp_path / "nothing.jsonl")


def test_media_root(tmp_path: Path) -> None:
    """Paths under another root than the manifest's folder."""
    path = write(tmp_path, [{"messages": [{"role": "user", "content": "?"}], "video": "v.mp4"}])
    manifest: Manifest = read_manifest(path, tmp_path / "elsewhere")
    assert manifest[0].media[0].path == str(tmp_path / "elsewhere" / "v.mp4")
