"""A made-up run folder of any size, written by the real ledger: for the report's tests and for looking at it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from dppo_mcore.practice.ledger import BufferRow, Ledger, PhasePlan, SftItem, TeacherAnswer
from dppo_mcore.types import Media, Rollout, Sample, ScoredRollout, Turn
from examples.tabletop.questions import KINDS, ask, full_answer
from examples.tabletop.render import render, write_video
from examples.tabletop.scene import scenes

GROUP = 8
SHARES = {"normal": 1.0}
PHASES = (
    ("base", 0, "base-sft"),
    ("1-1 RL", 1, "rl"),
    ("1-2 SFT", 1, "sft"),
    ("2-1 RL", 2, "rl"),
    ("2-2 SFT", 2, "sft"),
)
START = 1.79e9
HOSTILE = (
    '</script><script>globalThis.pwned = 1</script><img src="x" onerror="globalThis.pwned = 1">'
    " \u202egnol eb ot\u202c \u05e9\u05dc\u05d5\u05dd \x1b[31m {{blocks}}"
)
"""What a model, a manifest or a file name may hold: tags, marks that reverse text, right-to-left words, controls."""
SYLLABLES = (("gri", "blo", "mo", "ta", "ro"), ("p", "ck", "ve", "bl"), ("er", "s", "ed"))
WORDS = tuple(a + b + c for a in SYLLABLES[0] for b in SYLLABLES[1] for c in SYLLABLES[2])


def _samples(count: int, folder: Path, pool: str, clips: int) -> list[Sample]:
    rng = np.random.default_rng([count, len(pool)])
    drawn = scenes("pool" if pool == "rl" else "eval", max(40, count // 9 + 1), 3, (32.0,), SHARES)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(clips):
        write_video(folder / f"{number:05d}.mp4", render(drawn[number], 2), 2)
    found = []
    for number in range(count):
        place, kind = number // len(KINDS) % len(drawn), list(KINDS)[number % len(KINDS)]
        question = ask(drawn[place], kind, rng)
        media = Media("video", str(folder / f"{place:05d}.mp4"))
        found.append(
            Sample(f"{pool}-{number:05d}-{kind}", KINDS[kind].objective, (Turn("user", "<video>" + question.text),),
                   (media,), KINDS[kind].dimension, question.gold, None, "tabletop",
                   {"kind": kind, "truth": full_answer(question)})
        )  # fmt: skip
    return found


def _hostile() -> Sample:
    extras = {"truth": f"<think>{HOSTILE}</think><answer>{HOSTILE}</answer>"}
    turns = (Turn("user", HOSTILE),)
    return Sample("rl-hostile", "counting", turns, dimension=HOSTILE, gold=HOSTILE, source=HOSTILE, extras=extras)


def _sum(a: int, b: int) -> Sample:
    question = (Turn("user", f"what is {a} plus {b} ?"),)
    truth = {"truth": f"<answer>{a + b}</answer>"}
    return Sample(f"general-{a}-{b}", "exact", question, gold=str(a + b), source="general", extras=truth)


def _skill(sample: Sample, progress: float) -> float:
    """Chance of a right answer: planning opens only after the first refinement, the rest rises and levels off."""
    ease = (hash_of(sample.id) % 1000) / 1000
    if sample.objective == "planning":
        return 0.0 if progress < 0.45 else 0.75 * (1 - math.exp(-4 * (progress - 0.45))) * (0.4 + 0.6 * ease)
    reached = 0.25 + 0.6 * (1 - math.exp(-4 * progress))
    return float(np.clip(reached + 0.5 * (ease - 0.5), 0.0, 0.995))


def hash_of(text: str) -> int:
    """The same number in every process."""
    return sum((k + 1) * ord(c) for k, c in enumerate(text)) * 2654435761 % 2**31


def _answer(sample: Sample, right: bool, index: int, rng: np.random.Generator) -> ScoredRollout:
    text = str(sample.extras["truth"]) if right else "<think>red</think><answer>unsure</answer>"
    thought = " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), int(rng.integers(5, 40))))
    text = text.replace("<think>", f"<think>{thought} ", 1)
    if rng.random() < 0.1:
        text = text.replace("<think>", "<think><b>first & last</b> ", 1)
    tokens = tuple(int(t) for t in rng.integers(0, 90, 9))
    logprobs = tuple(float(v) for v in -rng.random(9).astype(np.float32))
    version = int(rng.integers(1, 40))
    parts = {"format": 1.0 if right else 0.5, "task": float(right)}
    finish = "stop" if rng.random() < 0.98 else "length"
    rollout = Rollout(sample.id, index, tokens, logprobs, text, finish, ((version, 0, 9),))
    error = "ValueError: gold holds no number" if rng.random() < 0.001 else None
    return ScoredRollout(rollout, 0.1 * parts["format"] + 0.9 * parts["task"], parts, right, error)


def make_run(folder: Path, rollouts: int = 4000, clips: int = 24, seed: int = 0) -> Path:
    """Write RUN/ledger.sqlite, metrics.jsonl and config.yaml; returns the folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pool = _samples(max(72, rollouts // GROUP // 2), folder / "media" / "pool", "rl", clips)
    pool.append(_hostile())
    held_out = _samples(180, folder / "media" / "eval", "eval", 4)
    general = [_sum(k % 9, k // 9) for k in range(60)]
    steps = max(12, rollouts // (GROUP * 64))
    with Ledger(folder / "ledger.sqlite") as ledger, (folder / "metrics.jsonl").open("w") as metrics:
        ledger.add_samples(pool, "rl")
        ledger.add_samples(held_out, "eval")
        ledger.add_samples(general, "eval-general")
        ledger.plan([PhasePlan(name, loop, kind, 32.0 * max(loop, 1)) for name, loop, kind in PHASES])
        step, clock, order = 0, START, 0
        for number, (name, _, kind) in enumerate(PHASES):
            ledger.start_phase(name, step)
            began, first = clock, step
            if kind == "rl":
                ledger.record_buffer(name, [BufferRow(s.id, ("kept", "mastered", "capped")[hash_of(s.id) % 3], 4, 2)
                                            for s in pool])  # fmt: skip
                per_step = max(8, rollouts // 2 // steps // GROUP)
                for local in range(steps):
                    progress = (number + local / steps) / len(PHASES)
                    group = [pool[(order + k) % len(pool)] for k in range(per_step)]
                    order += per_step
                    scored = [_answer(s, bool(rng.random() < _skill(s, progress)), k, rng)
                              for s in group for k in range(GROUP)]  # fmt: skip
                    ledger.record_rollouts(name, local, scored)
                    tasks = {s.objective: _task(s, progress, 0.2 + 0.75 * local / steps) for s in pool[:9]}
                    success = float(np.mean([one.success for one in scored]))
                    _write_step(metrics, step, name, progress, success, tasks, rng, clock)
                    step, clock = step + 1, clock + 4.0
                score = _mean_score(tasks)
                reason = f"S = {score:.2f}: " + ", ".join(f"{n} {t['score']:.2f}" for n, t in tasks.items())
                ledger.decide(name, steps, "stagnation", {"score": score, "tasks": tasks, "frozen": []}, reason)
            else:
                reason = "the corpus is through"
                if number:
                    _refine(ledger, name, pool, general, rng)
                for _ in range(steps // 2):
                    row = {"step": step, "time": clock, "phase": name, "sft/loss": 0.3 + rng.random() * 0.1,
                           "train/lr": 1e-5, "train/grad_norm": 1 + rng.random(), "time/forward_backward": 2.0,
                           "time/data": 0.2, "time/optimizer": 0.3}  # fmt: skip
                    metrics.write(json.dumps(row) + "\n")
                    step, clock = step + 1, clock + 2.5
            for set_name, samples, drift in (("eval", held_out, 0.0), ("eval-general", general, 0.4)):
                answers = [_answer(s, bool(rng.random() < max(_skill(s, (number + 1) / len(PHASES)), drift)), 0, rng)
                           for s in samples]  # fmt: skip
                ledger.record_evaluation(name, step - first, set_name, {}, answers)
            ledger.finish_phase(name, step, reason)
            clock += 6.0
            ledger.connection.execute(
                "UPDATE phases SET started_at = ?, ended_at = ? WHERE name = ?", (began, clock, name)
            )
        ledger.quarantine(str(folder / "media" / "broken.mp4"), pool[0].id, f"truncated: 3 of 64 frames {HOSTILE}")
    (folder / "config.yaml").write_text(
        "run:\n  run: synthetic\n  note: Made up & <b>counted</b>.\npractice:\n  stagnation_threshold: 0.7\n"
    )
    return folder


def _mean_score(tasks: dict[str, dict[str, Any]]) -> float:
    return float(np.mean([task["score"] for task in tasks.values()]))


def _task(sample: Sample, progress: float, flatness: float) -> dict[str, Any]:
    success = _skill(sample, progress)
    extremity = abs(2 * success - 1)
    return {"score": 0.3 * extremity + 0.7 * flatness, "success": success, "change": 0.004, "error": 0.01,
            "extremity": extremity, "flatness": flatness, "window": 12, "prompts": 640, "ready": True}  # fmt: skip


def _write_step(file: object, step: int, name: str, progress: float, success: float,
                tasks: dict[str, dict[str, Any]], rng: np.random.Generator, clock: float) -> None:  # fmt: skip
    row = {"step": step, "time": clock, "phase": name, "rl/reward": 0.1 + 0.9 * success, "rl/success": success,
           "rl/format": 0.9, "rl/kl_ref": 0.02 * progress + 0.002 * rng.random(), "rl/entropy": 1.2 - progress,
           "rl/response_tokens": 9 + rng.random(), "rl/live_groups": 0.5 - 0.3 * progress, "rl/all_pass": 0.2,
           "rl/all_fail": 0.3 - 0.2 * progress, "rl/loss": 0.01 * rng.normal(), "rl/clip_fraction_low": 0.01,
           "rl/clip_fraction_high": 0.02, "rl/stagnation": _mean_score(tasks),
           **{f"rl/stagnation/{objective}": task["score"] for objective, task in tasks.items()},
           "train/lr": 1e-6, "train/grad_norm": 1 + rng.random(), "train/mfu": 0.31 + 0.02 * rng.random(),
           "train/flops": 3e12, "rollout/flops": 2e12,
           "time/generate": 2.0, "time/reward": 0.1, "time/train": 1.6, "time/logprobs": 0.3, "time/sync": 0.1,
           "time/data": 0.05, "time/step": 3.9}  # fmt: skip
    file.write(json.dumps(row) + "\n")  # type: ignore[attr-defined]


def _refine(ledger: Ledger, name: str, pool: list[Sample], general: list[Sample], rng: np.random.Generator) -> None:
    """Teacher answers for unsolved samples and the corpus made of them."""
    weak = [pool[-1], *(s for s in pool if s.objective == "planning")][:200]
    answers = [
        TeacherAnswer(s.id, 0, k, "oracle", str(s.extras["truth"]), 1.0 if k < 3 else 0.1, k < 3, k == 0, None, 9)
        for s in weak
        for k in range(4)
    ]
    ledger.record_teacher(name, answers)
    chosen = [("weak", s) for s in weak] + [("retrieved", s) for s in pool[: len(weak) // 2]]
    chosen += [("general", s) for s in general[: max(1, len(weak) // 3)]]
    ledger.record_corpus(
        name,
        [SftItem(k, s.id, source, str(s.extras["truth"]), int(8 + rng.integers(4)), "success rate 0 in its last group")
         for k, (source, s) in enumerate(chosen)],
    )  # fmt: skip
