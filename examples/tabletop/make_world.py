"""Write the tabletop data set: clips, manifests and the oracle teacher's answers.

    python -m examples.tabletop.make_world --out DIR [--clips-base 2400 --clips-pool 2000 --clips-eval 240 ...]

The three splits share no configuration (`scene.split_of`). The base-training manifest is inconsistent on purpose, at
least in its last rows: half of the answers are in a style the verifier rejects, a fifth of the labels are wrong.
Planning is withheld in all of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from examples.tabletop.questions import GENERAL, GENERAL_KINDS, KINDS, Question, ask, ask_general, full_answer
from examples.tabletop.render import render, write_video
from examples.tabletop.scene import Level, Scene, Split, scenes

WITHHELD = "plan"
"""The kind of question that the base never sees: its success rate starts at exactly 0."""


@dataclass(frozen=True)
class WorldOptions:
    """Sizes and shares of a data set."""

    clips_base: int = 6000
    clips_pool: int = 2000
    clips_eval: int = 240
    questions_per_clip: int = 3
    base_turns: int = 4
    """Questions per base-training conversation, all about one clip."""
    base_conversations: int = 0
    """Conversations about the base's clips, in turn and each time about other things; 0 is one a clip."""
    base_consistent: float = 0.0
    """Share of the base's conversations, the first, that are right and in the wanted style."""
    general: int = 1500
    general_eval: int = 200
    long_share: float = 0.25
    """Share of clips of 64 s in pool and evaluation; the rest, and all of the base's, last 32 s."""
    vp9_share: float = 0.2
    """Share of clips encoded as VP9; the rest are h264."""
    fps: int = 2
    camera_fps: int = 25
    camera_share: float = 0.0
    """Share of pool and evaluation clips at `camera_fps` frames a second; the rest have `fps` and are made faster."""
    rejected_style: float = 0.5
    """Share of base answers that end in "unsure", the answer proper inside the thought."""
    bare_style: float = 0.15
    """Share of base answers without any tags."""
    wrong_labels: float = 0.2
    """Share of base answers that belong to another question of the same kind."""
    seed: int = 7

    @property
    def conversations(self) -> int:
        """Conversations about the base's clips."""
        return self.base_conversations or self.clips_base

    def consistent(self, count: int) -> int:
        """How many of `count` conversations, the first, are consistent."""
        return round(self.base_consistent * count)


LEVEL_SHARES: dict[Level, float] = {"trivial": 0.2, "normal": 0.65, "hard": 0.1, "impossible": 0.05}


def _encode(job: tuple[Scene, str, int]) -> None:
    scene, path, fps = job
    write_video(Path(path), render(scene, fps), fps)


def _row(identity: str, question: Question, clip: str | None, level: str, source: str) -> dict[str, Any]:
    """A manifest row in the project's own schema."""
    kind = {**KINDS, **GENERAL_KINDS}[question.kind]
    marker = "<video>" if clip else ""
    return {
        "id": identity,
        "objective": kind.objective,
        "dimension": kind.dimension,
        "media": [{"type": "video", "path": clip}] if clip else [],
        "messages": [{"role": "user", "content": marker + question.text}],
        "gold": question.gold,
        "extras": {**question.extras, "kind": question.kind, "level": level},
        "source": source,
    }


def _with_answer(row: dict[str, Any], answer: str) -> dict[str, Any]:
    return {**row, "messages": [*row["messages"], {"role": "assistant", "content": answer}]}


def _kinds(rng: np.random.Generator, count: int, withheld: bool) -> list[str]:
    names = [kind for kind in KINDS if not (withheld and kind == WITHHELD)]
    return [names[k] for k in rng.permutation(len(names))[:count]]


def _inconsistent_answer(question: Question, wrong: Question, options: WorldOptions, rng: np.random.Generator) -> str:
    """An annotator's answer: sometimes of another question, in one of three styles."""
    source = wrong if rng.random() < options.wrong_labels else question
    draw = rng.random()
    if draw < options.rejected_style:
        return f"<think>{source.answer}</think><answer>unsure</answer>"
    if draw < options.rejected_style + options.bare_style:
        return source.answer
    return full_answer(source)


def base_rows(clips: list[tuple[Scene, str]], options: WorldOptions, rng: np.random.Generator) -> Iterator[dict]:
    """Conversations of several questions about one clip: the clip is computed once for all of them."""
    for number in range(options.conversations):
        scene, clip = clips[number % len(clips)]
        asked = [ask(scene, kind, rng) for kind in _kinds(rng, options.base_turns, withheld=True)]
        turns: list[dict[str, str]] = []
        for turn, question in enumerate(asked):
            if number < options.consistent(options.conversations):
                answer = full_answer(question)
            else:
                stranger = clips[int(rng.integers(len(clips)))][0]
                answer = _inconsistent_answer(question, ask(stranger, question.kind, rng), options, rng)
            marker = "<video>" if turn == 0 else ""
            turns.append({"role": "user", "content": marker + question.text})
            turns.append({"role": "assistant", "content": answer})
        row = _row(f"base-{number:05d}", asked[-1], clip, scene.level, "tabletop-base")
        yield {**row, "messages": turns}


def question_rows(clips: list[tuple[Scene, str]], options: WorldOptions, rng: np.random.Generator, split: Split) -> (
    Iterator[tuple[dict, str]]
):  # fmt: skip
    """Single questions with the oracle's answer."""
    for number, (scene, clip) in enumerate(clips):
        for kind in _kinds(rng, options.questions_per_clip, withheld=False):
            question = ask(scene, kind, rng)
            row = _row(f"{split}-{number:05d}-{kind}", question, clip, scene.level, f"tabletop-{split}")
            yield row, full_answer(question)


def general_rows(count: int, seed: int, evaluation: bool) -> Iterator[dict]:
    """Text-only questions with answers; a fifth of the operand pairs is kept for evaluation."""
    rng = np.random.default_rng([seed, int(evaluation), 99])
    found = 0
    while found < count:
        question = ask_general(list(GENERAL_KINDS)[found % 2], rng)
        if (crc32(question.text.encode()) % 5 == 0) != evaluation:
            continue
        name = f"{GENERAL}-eval" if evaluation else GENERAL
        yield _with_answer(_row(f"{name}-{found:05d}", question, None, "trivial", GENERAL), full_answer(question))
        found += 1


def general_conversations(rows: list[dict], options: WorldOptions, rng: np.random.Generator) -> Iterator[dict]:
    """The same questions as conversations of several turns, for the base: one for every four of the others."""
    for number in range(options.conversations // 4):
        picked = [rows[int(k)] for k in rng.integers(len(rows), size=options.base_turns)]
        turns = [turn for row in picked for turn in row["messages"]]
        yield {**picked[-1], "id": f"base-{GENERAL}-{number:05d}", "messages": turns}


def base_mix(clips: list[tuple[Scene, str]], general: list[dict], options: WorldOptions, rng: np.random.Generator) -> (
    list[dict]
):  # fmt: skip
    """The base's conversations, shuffled; consistent ones stay before the others, each with their share of general."""
    shown = list(base_rows(clips, options, rng))
    texts = list(general_conversations(general, options, rng))
    cuts = [options.consistent(len(rows)) for rows in (shown, texts)]
    first, then = shown[: cuts[0]] + texts[: cuts[1]], shown[cuts[0] :] + texts[cuts[1] :]
    return [rows[k] for rows in (first, then) for k in rng.permutation(len(rows))]


def _write(path: Path, rows: Iterator[dict] | list[dict]) -> int:
    count = 0
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


def make_clips(out: Path, split: Split, count: int, options: WorldOptions, workers: int) -> list[tuple[Scene, str]]:
    """Scenes of a split and their files, relative to `out`; files that exist are kept."""
    every = round(1 / options.long_share) if options.long_share and split != "base" else 0
    lengths = tuple([64.0] + [32.0] * (every - 1)) if every else (32.0,)
    drawn = scenes(split, count, options.seed, lengths, LEVEL_SHARES)
    folder = out / "clips" / split
    folder.mkdir(parents=True, exist_ok=True)
    vp9 = round(1 / options.vp9_share) if options.vp9_share else 0
    camera = np.random.default_rng([options.seed, 25]).random(count) < (0 if split == "base" else options.camera_share)
    named = [(scene, f"clips/{split}/{k:05d}.{'webm' if vp9 and k % vp9 == 0 else 'mp4'}")
             for k, scene in enumerate(drawn)]  # fmt: skip
    rates = np.where(camera, options.camera_fps, options.fps).tolist()
    jobs = [(scene, str(out / path), fps) for (scene, path), fps in zip(named, rates, strict=True)
            if not (out / path).exists()]  # fmt: skip
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_encode, jobs, chunksize=32))
    return named


def _clear_other_clips(out: Path, wanted: dict[str, Any]) -> None:
    """Note what is being made; clips that an unfinished or earlier call made with other options are removed."""
    making = out / "making.json"
    if not making.exists() or json.loads(making.read_text()) != wanted:
        shutil.rmtree(out / "clips", ignore_errors=True)
        making.write_text(json.dumps(wanted))


def make_world(out: Path, options: WorldOptions, workers: int = 2) -> dict[str, Any]:
    """Write everything under `out`; returns the summary that is also in world.json."""
    summary_file = out / "world.json"
    wanted = dataclasses.asdict(options)
    if summary_file.exists() and json.loads(summary_file.read_text())["options"] == wanted:
        return json.loads(summary_file.read_text())
    out.mkdir(parents=True, exist_ok=True)
    _clear_other_clips(out, wanted)
    started = time.perf_counter()
    rng = np.random.default_rng(options.seed)
    rows: dict[str, int] = {}
    base = make_clips(out, "base", options.clips_base, options, workers)
    pool = make_clips(out, "pool", options.clips_pool, options, workers)
    held_out = make_clips(out, "eval", options.clips_eval, options, workers)
    clip_seconds = time.perf_counter() - started
    general = list(general_rows(options.general, options.seed, evaluation=False))
    rows["base"] = _write(out / "base.jsonl", base_mix(base, general, options, rng))
    questions = list(question_rows(pool, options, rng, "pool"))
    rows["pool"] = _write(out / "pool.jsonl", [row for row, _ in questions])
    rows["teacher"] = _write(out / "teacher.jsonl", [{"id": row["id"], "answer": a} for row, a in questions])
    rows["pool_labelled"] = _write(out / "pool_labelled.jsonl", [_with_answer(row, a) for row, a in questions])
    held_out_rows = question_rows(held_out, options, rng, "eval")
    rows["eval"] = _write(out / "eval.jsonl", [row for row, _ in held_out_rows])
    rows["general"] = _write(out / "general.jsonl", general)
    general_eval = general_rows(options.general_eval, options.seed, evaluation=True)
    rows["eval_general"] = _write(out / "eval_general.jsonl", general_eval)
    clips = options.clips_base + options.clips_pool + options.clips_eval
    summary = {"options": wanted, "rows": rows, "clips": clips, "clip_seconds": round(clip_seconds, 1),
               "clips_per_second": round(clips / max(clip_seconds, 1e-9), 1),
               "bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file())}  # fmt: skip
    summary_file.write_text(json.dumps(summary, indent=1))
    return summary


def main() -> None:
    """Command line; every field of WorldOptions is a flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--workers", type=int, default=2, help="encoder processes")
    for option in dataclasses.fields(WorldOptions):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default), default=option.default)
    arguments = vars(parser.parse_args())
    out, workers = arguments.pop("out"), arguments.pop("workers")
    print(json.dumps(make_world(out, WorldOptions(**arguments), workers)))


if __name__ == "__main__":
    main()
