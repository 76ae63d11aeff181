"""SFT phases: the base before the first loop, and each loop's corpus of weaknesses and their company."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dppo_mcore.data.loader import Batches
from dppo_mcore.data.worker import Request
from dppo_mcore.learn.sft import sft_step
from dppo_mcore.metaloop import position, usable
from dppo_mcore.metaloop.rolling import agreed, my_share
from dppo_mcore.metaloop.run import Run
from dppo_mcore.practice import curriculum
from dppo_mcore.practice.ledger import PhasePlan, SftItem
from dppo_mcore.practice.refine import refine
from dppo_mcore.runtime.errors import UserError


@dataclass(frozen=True)
class Lesson:
    """One conversation to learn: a sample of a pool and the answer to give."""

    pool: str
    sample_id: str
    answer: str
    source: str


def base_lessons(run: Run) -> list[Lesson]:
    """The lessons of `base_data`: its samples with their answers."""
    return [
        Lesson("base", sample.id, sample.answer, sample.source or "base")
        for sample in run.pools["base"]
        if sample.answer is not None
    ]


def learn(
    run: Run, phase: PhasePlan, lessons: Sequence[Lesson], steps: int, lr: float, done: int, seed: int, window: int = 0
) -> None:
    """`steps` SFT steps over seeded passes through the lessons; `done` of them are in the loaded checkpoint."""
    size = run.config.sft.global_batch_size
    if done == 0:
        run.learner.begin_phase(phase.name, lr, steps)
    else:
        run.learner.continue_phase(lr, steps)
    batches = Batches(
        run.source,
        lambda row: _request(run, lessons[row], phase.horizon),
        len(lessons),
        size,
        seed,
        share=lambda requests: my_share(run, requests),
        plans=run.exchange.replicas > 1 and run.exchange.rank == 0,
        step=done,
        steps=steps,
        window=window,
    )
    step, barren = done, 0
    while step < steps:
        began = time.perf_counter()
        conversations = agreed(run, next(batches))
        data_seconds = time.perf_counter() - began
        barren = 0 if any(run.exchange.everywhere([len(conversations)])) else barren + size
        if barren >= min(len(lessons), steps * size, usable.ENOUGH):
            _nothing_to_learn(run, phase, lessons)
        result = sft_step(run.learner, conversations)
        step, run.step = step + 1, run.step + 1
        values = {**result.metrics, "time/data": data_seconds, "time/step": time.perf_counter() - began}
        run.metrics.log(run.step, values, phase=phase.name, phase_step=step)
        if step % run.config.output.log_interval == 0:
            run.say(_line(phase.name, step, steps, values))
        if step < steps:
            position.save_if_due(run, phase.name, step)
    position.finish_phase(run, phase.name, step, f"{steps} steps over {len(lessons)} lessons")


def _nothing_to_learn(run: Run, phase: PhasePlan, lessons: Sequence[Lesson]) -> None:
    """End the run on steps that had no usable lesson. Collective."""
    damaged = usable.set_aside(run, {lesson.sample_id: lesson.pool for lesson in lessons}, phase.horizon, learnt=True)
    if run.exchange.rank == 0 and damaged:
        raise usable.nothing_usable(run, phase.name, damaged, len(damaged))


def _request(run: Run, lesson: Lesson, horizon: float | None) -> Request:
    sample = replace(run.sample(lesson.pool, lesson.sample_id), source=lesson.source)
    return Request(sample, horizon, lesson.answer)


def _line(phase: str, step: int, steps: int, values: Mapping[str, float]) -> str:
    shown = {"loss": "sft/loss", "grad": "train/grad_norm", "lr": "train/lr", "s": "time/step"}
    return f"{phase} step {step:4d}/{steps}  " + "  ".join(
        f"{k} {values[v]:.4g}" for k, v in shown.items() if v in values
    )


def make_base(run: Run, phase: PhasePlan, done: int) -> None:
    """SFT on `base_data` before the first loop."""
    lessons = base_lessons(run)
    if not lessons:
        raise UserError(f"base_data: no row of {run.pools['base'].path} has an answer to learn")
    sft = run.config.sft
    seed = run.config.run.seed_of("base")
    learn(run, phase, lessons, sft.base_sft_steps, sft.base_sft_lr, done, seed, sft.base_sft_window)


def study(run: Run, phase: PhasePlan, done: int) -> None:
    """Make the loop's corpus, once, and learn it."""
    corpus = run.exchange.from_rank0(lambda: _make_corpus(run, phase))
    lessons = [Lesson(_pool_of(run, item), item.sample_id, item.answer, item.source) for item in corpus]
    sft = run.config.sft
    steps = -(-len(lessons) * sft.sft_epochs // sft.global_batch_size)
    if sft.sft_max_steps is not None:
        steps = min(steps, sft.sft_max_steps)
    if not lessons:
        run.say(f"{phase.name}: nothing to learn, no weakness has an answer")
        steps = 0
    learn(run, phase, lessons, steps, sft.sft_lr, done, run.config.run.seed_of(phase.name))


def _make_corpus(run: Run, phase: PhasePlan) -> list[SftItem]:
    ledger = run.ledger
    practised = [name for p in ledger.phases() if p.loop == phase.loop and p.kind == "rl" for name in
                 ledger.success_rates([p.name])]  # fmt: skip
    corpus = refine(
        ledger,
        weakness=curriculum.weakness_name(phase.loop),
        sft=phase.name,
        pool={sample.id: sample for sample in run.pools["rl"]},
        practised=set(practised),
        general=run.pools.get("general", ()),
        template=run.template,
        count_tokens=lambda text: len(run.processor.chat.encode(text)),
        config=run.config.practice,
        seed=run.config.run.seed_of(f"corpus {phase.name}"),
    )
    made = ledger.decisions("corpus", phase.name)
    run.say(f"{phase.name}: {made[-1].reason if made else corpus.summary()}")
    return corpus.items


def _pool_of(run: Run, item: SftItem) -> str:
    return "general" if item.source == "general" else "rl"
