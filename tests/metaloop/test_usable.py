"""A run whose clips can't be used ends with an error that says so, and goes on once they can."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dppo_mcore.data import errors
from dppo_mcore.data.errors import LengthError, MediaError
from dppo_mcore.data.messages import use_of
from dppo_mcore.data.quarantine import Quarantine
from dppo_mcore.metaloop import rl_phase, usable
from dppo_mcore.metaloop.rolling import Batch
from dppo_mcore.practice.difficulty import Draw
from dppo_mcore.practice.ledger import BufferRow, Group, Ledger, PhasePlan
from dppo_mcore.runtime.errors import UserError
from dppo_mcore.types import Media, Sample, Turn
from tests.data.clips import write_clip
from tests.metaloop import harness

PHASE = PhasePlan("1-1 RL", 1, "rl", 32.0)
ROWS = 12
OPTIONS = {
    "dtype": "fp32", "fps": 1, "max-frames": 4, "min-pixels": 3136, "max-pixels": 3136, "mode": "rl-only", "loops": 1,
    "kl-coef": 0, "group-size": 2, "prompts-per-step": 4, "rl-min-steps": 1, "rl-max-steps": 3, "buffer-rollouts": 2,
    "global-batch-size": 4, "max-prompt-tokens": 512, "max-response-tokens": 4, "data-workers": 0, "reward-workers": 0,
    "max-tokens-per-micro-batch": 2048,
}  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "changes"),
    [
        ("base SFT", {"base-sft-steps": 2}),
        ("1-1 buffer", {"eval-samples": 2}),
        ("1-1 RL", {"sampling": "random", "rl-max-steps": 9}),
        ("1-1 RL", {"sampling": "random", "rl-max-steps": 1}),
    ],
    ids=["base", "buffer", "random", "one step"],
)
def test_a_wrong_media_root_ends_the_run(tiny_dir: str, tmp_path: Path, phase: str, changes: dict[str, Any]) -> None:
    """With status 1 in one line. The right root, or clips that came, let the same run folder go on."""
    clip = write_clip(tmp_path / "clip.mp4", frames=16, fps=4, size=(56, 56))
    turns = [{"role": "user", "content": "<video>Done?"}, {"role": "assistant", "content": "yes"}]
    rows = [{"id": f"s{n}", "video": f"clips/{n}.mp4", "messages": turns} for n in range(ROWS)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = OPTIONS | {"run-folder": tmp_path / "run", "model": tiny_dir, "data": tmp_path / "pool.jsonl"} | changes
    options |= {"base-data": tmp_path / "pool.jsonl", "media-root": tmp_path / "wrong"}
    if "eval-samples" in changes:
        options["eval-data"] = tmp_path / "pool.jsonl"
    (tmp_path / "wrong").mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "dppo_mcore.train", "--no-tensorboard"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    log = tmp_path / "log"
    assert harness.start(command, log).wait(600) == 1
    line = log.read_text().splitlines()[-1]
    known = 8 if phase == "base SFT" else 4 if changes.get("rl-max-steps") == 1 else ROWS
    assert line.startswith(f"error: {phase}: {known} of {known} samples can't be used, the first: sample 's"), line
    assert f"{tmp_path}/wrong/clips/" in line and "missing file" in line and "Traceback" not in log.read_text()
    assert f"{tmp_path}/run/quarantine-*.jsonl" in line and "run the same command again" in line
    assert "1-1 RL step    3" not in log.read_text()
    if "sampling" in changes:
        command[command.index(str(tmp_path / "wrong"))] = str(tmp_path / "right")
    root = tmp_path / ("right" if "sampling" in changes else "wrong")
    (root / "clips").mkdir(parents=True)
    for n in range(ROWS):
        shutil.copy(clip, root / "clips" / f"{n}.mp4")
    harness.finish(command, log)
    with Ledger(tmp_path / "run" / "ledger.sqlite", write=False) as ledger:
        assert all(row.state == "done" for row in ledger.phases())
        assert len(ledger.rollouts("1-1 RL", 0)) == 4 and ledger.quarantined() == {}
        evaluated = [(entry.phase, entry.metrics["all"]["n"]) for entry in ledger.evaluations()]
    assert evaluated == ([("1-1 buffer", 2), ("1-1 RL", 2)] if "eval-samples" in changes else [])


def fake_run(tmp_path: Path, names: list[str], lost: list[str]) -> Any:
    """One rank whose quarantine holds the lost ones."""
    samples = {name: Sample(name, "exact", (Turn("user", "?"),), (Media("video", f"/{name}.mp4"),)) for name in names}
    quarantine = Quarantine()
    for name in lost:
        quarantine.add(name, MediaError(f"/{name}.mp4", errors.MISSING), samples[name].media)
    said: list[str] = []
    exchange = SimpleNamespace(at_rank0=lambda values: values, rank=0)
    source = SimpleNamespace(quarantine=quarantine)
    return SimpleNamespace(
        exchange=exchange, source=source, pools={"rl": samples}, folder=tmp_path, say=said.append, said=said
    )


def drawing(names: list[str], mastered: int) -> Draw:
    """Of the names so many mastered, the others kept."""
    samples = [Sample(name, "exact", ()) for name in names]
    rows = [BufferRow(name, "mastered" if n < mastered else "kept", 4, 2) for n, name in enumerate(names)]
    return Draw(samples, rows, seed=0)


def judged(run: Any, draw: Draw, ids: list[str], before: dict[str, Any] | None = None, groups: Any = ()) -> str:
    barren = rl_phase._unusable(run, PHASE, Batch(list(groups), {}), ids, before or {})
    return rl_phase._judge_unusable(run, PHASE, draw, barren)


def test_measuring_needs_a_tenth(tmp_path: Path) -> None:
    """All the pool's but a few, or of what RL left unsolved a good number; fewer are only counted."""
    names = [f"s{n}" for n in range(40)]
    run = fake_run(tmp_path, names, names[:37])
    with pytest.raises(
        UserError, match=r"^1-1 buffer: 37 of 40 samples can't be used, the first: sample 's0': /s0.mp4: m"
    ):
        usable.require(run, "1-1 buffer", names, 32.0)
    usable.require(run, "1-1 buffer", names[:37] + names[37:] * 2, 32.0)
    usable.require(run, "1-2 weakness", names[:31], 32.0, least=usable.ENOUGH)
    assert [line.split(",")[0] for line in run.said] == [
        "1-1 buffer: 37 of 43 samples can't be used", "1-2 weakness: 31 of 31 samples can't be used"
    ]  # fmt: skip
    with pytest.raises(UserError):
        usable.require(run, "1-2 weakness", names[:32], 32.0, least=usable.ENOUGH)
    usable.require(fake_run(tmp_path, names, []), "1-1 buffer", names, 32.0)


def test_what_is_too_long_counts_where_it_was_asked_for(tmp_path: Path) -> None:
    """Named with its length; neither at another horizon nor as a lesson is it missing."""
    names = [f"s{n}" for n in range(12)]
    run = fake_run(tmp_path, names, [])
    for name in names:
        error = LengthError("600 prompt tokens, above max_prompt_tokens 512")
        run.source.quarantine.add(name, error, run.pools["rl"][name].media, use_of(32.0, learnt=False))
    usable.require(run, "2-1 buffer", names, 16.0)
    assert len(rl_phase._unusable(run, PHASE, Batch([], {}), names, {})) == 12
    assert not usable.set_aside(run, dict.fromkeys(names, "rl"), 32.0, learnt=True)
    with pytest.raises(
        UserError, match="12 of 12 samples can't be used, .*: too long: prompt of 32 s: 600 prompt tokens"
    ):
        usable.require(run, "1-1 buffer", names, 32.0)


def test_steps_of_unusable_samples(tmp_path: Path) -> None:
    """One usable sample and the phase goes on; none of 32, or none of all that can be drawn, and the run ends."""
    names = [f"s{n}" for n in range(64)]
    run, draw = fake_run(tmp_path, names, names[:60]), drawing(names, 0)
    whole = SimpleNamespace(prompt=SimpleNamespace(sample=SimpleNamespace(id="s61")))
    assert judged(run, draw, names[:31]) == judged(run, draw, names[56:64]) == ""
    assert judged(run, draw, names[:40], groups=[whole]) == ""  # carried over from a step before
    before = rl_phase._unusable(run, PHASE, Batch([], {}), names[:16], {})
    with pytest.raises(UserError, match="^1-1 RL: 32 of 32 samples can't be used"):
        judged(run, draw, names[16:32], before)
    few = names[:6]
    with pytest.raises(UserError, match="^1-1 RL: 6 of 6 samples can't be used"):
        judged(run, drawing(few, 0), few)


def test_the_last_that_can_be_drawn_is_unusable(tmp_path: Path) -> None:
    """The others were practised: the phase ends, and doesn't call them all mastered."""
    names = [f"s{n}" for n in range(12)]
    run = fake_run(tmp_path, names, names[11:])
    reason = judged(run, drawing(names, 11), names[11:])
    assert (
        reason
        == (
            "nothing left to draw of 12 samples: 11 mastered; 1 of 12 samples can't be used, the first: "
            "sample 's11': /s11.mp4: missing file: [Errno 2]"[:-11]
        )
    )


def test_mastered_is_not_unusable(tmp_path: Path) -> None:
    names = [f"s{n}" for n in range(4)]
    run, draw = fake_run(tmp_path, names, []), drawing(names, 3)
    draw.update([Group(0, "s3", "exact", 4, 4)])
    assert draw.draw(2) == []
    assert rl_phase._nothing_left(run, PHASE, draw) == "nothing left to draw of 4 samples: 4 mastered"
    with pytest.raises(UserError, match="^1-1 RL: its buffer is empty, no sample of the pool could be used"):
        rl_phase._nothing_left(run, PHASE, drawing([], 0))
