"""A made-up run folder of any size, written by the real ledger: for the report's tests and for looking at it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dppo_mcore.practice.ledger import BufferRow, Ledger, PhasePlan, SftItem, TeacherAnswer
from dppo_mcore.types import Media, Rollout, Sample, ScoredRollout, Turn
from examples.tabletop.questions import KINDS, ask, full_answer
from examples.tabletop.render import render, write_video
from examples.tabletop.scene import scenes

GROUP = 8
SHARES = {"normal": 1.0}
PHASES = (
    ("base SFT", 0, "base-sft"),
    ("1-1 buffer", 1, "buffer"),
    ("1-1 RL", 1, "rl"),
    ("1-2 weakness", 1, "weakness"),
    ("1-2 SFT", 1, "sft"),
    ("2-1 buffer", 2, "buffer"),
    ("2-1 RL", 2, "rl"),
    ("2-2 weakness", 2, "weakness"),
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
    folder.mkdir(parents=True, exist_ok=True)
    pool = _samples(max(72, rollouts // GROUP // 2), folder / "media" / "pool", "rl", clips)
    pool.append(_hostile())
    held_out = _samples(180, folder / "media" / "eval", "eval", 4)
    general = [_sum(k % 9, k // 9) for k in range(60)]
    with Ledger(folder / "ledger.sqlite") as ledger, (folder / "metrics.jsonl").open("w") as metrics:
        ledger.add_samples(pool, "rl")
        ledger.add_samples(held_out, "eval")
        ledger.add_samples(general, "eval-general")
        ledger.plan([PhasePlan(name, loop, kind, 32.0 * max(loop, 1)) for name, loop, kind in PHASES])
        made = _Made(ledger, metrics, pool, held_out, general, max(12, rollouts // (GROUP * 64)), rollouts,
                     np.random.default_rng(seed))  # fmt: skip
        for number, (name, _, kind) in enumerate(PHASES):
            made.phase(number, name, kind)
        ledger.quarantine(str(folder / "media" / "broken.mp4"), pool[0].id, f"truncated: 3 of 64 frames {HOSTILE}")
    (folder / "config.yaml").write_text(
        "run:\n  run: synthetic\n  note: Made up & <b>counted</b>.\npractice:\n  stagnation_threshold: 0.7\n"
    )
    return folder


@dataclass
class _Made:
    """A run while it is made up: what its phases share."""

    ledger: Ledger
    metrics: TextIO
    pool: list[Sample]
    held_out: list[Sample]
    general: list[Sample]
    steps: int
    """Of an RL phase; an SFT phase has half as many."""
    rollouts: int
    rng: np.random.Generator
    step: int = 0
    clock: float = START
    drawn: int = 0

    def phase(self, number: int, name: str, kind: str) -> None:
        """One phase as a run leaves it: it starts at the run's step and ends after so many of its own."""
        self.ledger.start_phase(name, self.step)
        began, first = self.clock, self.step
        if kind == "buffer":
            statuses = ("kept", "mastered", "capped")
            self.ledger.record_buffer(name, [BufferRow(s.id, statuses[hash_of(s.id) % 3], 4, 2) for s in self.pool])
        elif kind == "weakness":
            self._teach(name)
        elif kind == "rl":
            self._practise(number, name)
        else:
            self._refine(name, kind == "sft")
        if self.step > first:
            self._evaluate(name, self.step - first, (number + 1) / len(PHASES))
        self.ledger.finish_phase(name, self.step - first, "all steps done" if self.step > first else "measured")
        self.clock += 6.0
        self.ledger.connection.execute(
            "UPDATE phases SET started_at = ?, ended_at = ? WHERE name = ?", (began, self.clock, name)
        )

    def log(self, seconds: float, **values: Any) -> None:
        """A row of figures at the run's step."""
        self.clock += seconds
        self.metrics.write(json.dumps({"step": self.step, "time": self.clock, **values}) + "\n")

    def _practise(self, number: int, name: str) -> None:
        per_step = max(8, self.rollouts // 2 // self.steps // GROUP)
        for local in range(self.steps):
            progress = (number + local / self.steps) / len(PHASES)
            group = [self.pool[(self.drawn + k) % len(self.pool)] for k in range(per_step)]
            self.drawn += per_step
            scored = [_answer(s, bool(self.rng.random() < _skill(s, progress)), k, self.rng)
                      for s in group for k in range(GROUP)]  # fmt: skip
            self.ledger.record_rollouts(name, local, scored)
            tasks = {s.objective: _task(s, progress, 0.2 + 0.75 * local / self.steps) for s in self.pool[:9]}
            success = float(np.mean([one.success for one in scored]))
            self.log(0.1, **{"time/sync": 0.1})
            self.step += 1
            self.log(3.9, phase=name, phase_step=local + 1, **_figures(progress, success, tasks, self.rng))
            if local + 1 == self.steps // 2:
                self._evaluate(name, local + 1, progress)
        score = _mean_score(tasks)
        reason = f"S = {score:.2f}: " + ", ".join(f"{n} {t['score']:.2f}" for n, t in tasks.items())
        self.ledger.decide(name, self.steps, "stagnation", {"score": score, "tasks": tasks, "frozen": []}, reason)

    def _refine(self, name: str, corpus: bool) -> None:
        if corpus:
            weak = _weak(self.pool)
            chosen = [("weak", s) for s in weak] + [("retrieved", s) for s in self.pool[: len(weak) // 2]]
            chosen += [("general", s) for s in self.general[: max(1, len(weak) // 3)]]
            why = "success rate 0 in its last group"
            self.ledger.record_corpus(
                name,
                [SftItem(k, s.id, source, str(s.extras["truth"]), int(8 + self.rng.integers(4)), why)
                 for k, (source, s) in enumerate(chosen)],
            )  # fmt: skip
        for local in range(self.steps // 2):
            self.step += 1
            loss, norm = 0.3 + self.rng.random() * 0.1, 1 + self.rng.random()
            row = {"sft/loss": loss, "train/lr": 1e-5, "train/grad_norm": norm, "time/forward_backward": 2.0,
                   "time/data": 0.2, "time/optimizer": 0.3, "time/step": 2.5}  # fmt: skip
            self.log(2.5, phase=name, phase_step=local + 1, **row)

    def _teach(self, name: str) -> None:
        """Teacher answers for unsolved samples."""
        answers = [
            TeacherAnswer(s.id, 0, k, "oracle", str(s.extras["truth"]), 1.0 if k < 3 else 0.1, k < 3, k == 0, None, 9)
            for s in _weak(self.pool)
            for k in range(4)
        ]
        self.ledger.record_teacher(name, answers)

    def _evaluate(self, name: str, local: int, progress: float) -> None:
        found = {}
        for set_name, samples, drift in (("eval", self.held_out, 0.0), ("eval-general", self.general, 0.4)):
            answers = [_answer(s, bool(self.rng.random() < max(_skill(s, progress), drift)), 0, self.rng)
                       for s in samples]  # fmt: skip
            self.ledger.record_evaluation(name, local, set_name, {}, answers)
            found[set_name] = answers
        row = {"eval/success": _share(found["eval"]), "eval/general": _share(found["eval-general"])}
        for objective in sorted({sample.objective for sample in self.held_out}):
            of = [answer for sample, answer in zip(self.held_out, found["eval"], strict=True)
                  if sample.objective == objective]  # fmt: skip
            row[f"eval/success/{objective}"] = _share(of)
        self.log(0.0, phase=name, **row)


def _weak(pool: list[Sample]) -> list[Sample]:
    return [pool[-1], *(s for s in pool if s.objective == "planning")][:200]


def _share(answers: list[ScoredRollout]) -> float:
    return float(np.mean([answer.success for answer in answers]))


def _mean_score(tasks: dict[str, dict[str, Any]]) -> float:
    return float(np.mean([task["score"] for task in tasks.values()]))


def _task(sample: Sample, progress: float, flatness: float) -> dict[str, Any]:
    success = _skill(sample, progress)
    extremity = abs(2 * success - 1)
    return {"score": 0.3 * extremity + 0.7 * flatness, "success": success, "change": 0.004, "error": 0.01,
            "extremity": extremity, "flatness": flatness, "window": 12, "prompts": 640, "ready": True}  # fmt: skip


def _figures(
    progress: float, success: float, tasks: dict[str, dict[str, Any]], rng: np.random.Generator
) -> dict[str, float]:
    """What an RL step logs."""
    return {"rl/reward": 0.1 + 0.9 * success, "rl/success": success,
            "rl/format": 0.9, "rl/kl_ref": 0.02 * progress + 0.002 * rng.random(), "rl/entropy": 1.2 - progress,
            "rl/response_tokens": 9 + rng.random(), "rl/live_groups": 0.5 - 0.3 * progress, "rl/all_pass": 0.2,
            "rl/all_fail": 0.3 - 0.2 * progress, "rl/loss": 0.01 * rng.normal(), "rl/clip_fraction_low": 0.01,
            "rl/clip_fraction_high": 0.02, "rl/stagnation": _mean_score(tasks),
            **{f"rl/stagnation/{objective}": task["score"] for objective, task in tasks.items()},
            "train/lr": 1e-6, "train/grad_norm": 1 + rng.random(), "train/mfu": 0.31 + 0.02 * rng.random(),
            "train/flops": 3e12, "rollout/flops": 2e12,
            "time/generate": 2.0, "time/reward": 0.1, "time/train": 1.6, "time/logprobs": 0.3,
            "time/data": 0.05, "time/step": 3.9}  # fmt: skip
