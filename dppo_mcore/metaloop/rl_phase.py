"""An RL phase: practise what the buffer holds until nothing more is revealed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from dppo_mcore.data.quarantine import Damage
from dppo_mcore.learn.rl import RlResult, rl_step
from dppo_mcore.metaloop import carrying, position, usable
from dppo_mcore.metaloop.rolling import Batch, roll_out
from dppo_mcore.metaloop.run import Run
from dppo_mcore.metaloop.weights import awake
from dppo_mcore.practice import curriculum
from dppo_mcore.practice.difficulty import Draw
from dppo_mcore.practice.ledger import PhasePlan
from dppo_mcore.practice.ledger_rollouts import Group as Counts
from dppo_mcore.practice.stagnation import Stagnation, Verdict
from dppo_mcore.runtime.errors import UserError


def practise(run: Run, phase: PhasePlan, done: int) -> None:
    """RL steps until the stagnation score ends the phase; `done` of them are in the loaded checkpoint."""
    config = run.config
    updates = config.practice.rl_max_steps * config.rl.updates_per_batch
    if done == 0:
        run.learner.begin_phase(phase.name, config.rl.rl_lr, updates)
    else:
        run.learner.continue_phase(config.rl.rl_lr, updates)
    if config.rl.kl_coef and (done == 0 or run.learner.reference is None):
        run.learner.keep_reference()
    draw, stagnation = _controller(run, phase, done)
    if done and _evaluates(run, done):
        position.evaluate_saved(run, phase.name, done)  # where it was stopped; else it is known
    step = done
    barren: dict[str, Damage] = {}
    verdict = run.exchange.from_rank0(lambda: stagnation.verdict() if stagnation else None)
    reason = verdict.reason
    while not verdict.stop:
        began = time.perf_counter()
        ids, upcoming = run.exchange.from_rank0(lambda: _drawn(draw, config.rl.prompts_per_step))
        if not ids:
            reason = run.exchange.from_rank0(lambda: _nothing_left(run, phase, draw))
            break
        batch = _step_groups(run, phase, ids, upcoming, step)
        barren = _unusable(run, phase, batch, ids, barren)
        if left := run.exchange.from_rank0(lambda: _judge_unusable(run, phase, draw, barren)):  # noqa: B023
            reason = left
            break
        result = rl_step(run.learner, batch.groups)
        step, run.step = step + 1, run.step + 1
        verdict = run.exchange.from_rank0(lambda: _judge(run, phase, draw, stagnation, step))  # noqa: B023
        _report(run, phase, step, batch, result, verdict, time.perf_counter() - began)
        reason = verdict.reason
        if not verdict.stop:
            score = position.evaluate_inside(run, phase.name, step) if _evaluates(run, step) else None
            position.save_if_due(run, phase.name, step, score)
    else:
        if barren and not run.ledger.success_rates([phase.name]):
            raise usable.nothing_usable(run, phase.name, barren, len(barren))
    run.source.reset()  # the step announced last doesn't come
    if run.exchange.rank == 0:
        numbers = stagnation.verdict().numbers() if stagnation and step else {}
        run.ledger.decide(phase.name, step, "stagnation", numbers, reason)
    run.say(f"{phase.name} ends at step {step}: {reason}")
    position.finish_phase(run, phase.name, step, reason)
    carrying.forget(run, phase, step)


def _controller(run: Run, phase: PhasePlan, done: int) -> tuple[Draw | None, Stagnation | None]:
    """Rank 0's draw and score, brought to where the phase stands."""
    if run.exchange.rank != 0:
        return None, None
    practice = run.config.practice
    stagnation = Stagnation(
        threshold=practice.stagnation_threshold,
        window=practice.stagnation_window,
        min_prompts=practice.stagnation_min_prompts,
        aggregate=practice.stagnation_aggregate,
        min_steps=practice.rl_min_steps,
        max_steps=practice.rl_max_steps,
    )
    draw = Draw(
        run.ledger.samples("rl").values(),
        run.ledger.buffer(curriculum.buffer_name(phase.loop)),
        seed=run.config.run.seed_of(f"draw {phase.name}"),
        sampling=practice.sampling,
    )
    behind = run.ledger.groups(phase.name, before_step=done)
    draw.replay(behind, run.config.rl.prompts_per_step, stagnation, steps=done)
    return draw, stagnation


def _evaluates(run: Run, step: int) -> bool:
    """Whether an evaluation is due after so many steps."""
    interval = run.config.output.eval_interval
    return interval > 0 and step % interval == 0


def _drawn(draw: Draw | None, prompts: int) -> tuple[list[str], list[str]]:
    """A step's ids, and those that the next step will draw unless this one's answers change it."""
    assert draw is not None
    return draw.draw(prompts), draw.peek(prompts)


def _step_groups(run: Run, phase: PhasePlan, ids: list[str], upcoming: list[str], step: int) -> Batch:
    """This replica's groups of a step."""
    recorded = run.exchange.from_rank0(lambda: run.ledger.rollouts(phase.name, step))
    with awake(run):
        if run.config.rollout.rollout_partial:
            return carrying.roll_out_step(run, phase, ids, upcoming, step)
        return roll_out(
            run,
            ids,
            run.config.rl.group_size,
            pool="rl",
            horizon=phase.horizon,
            label=f"{phase.name}/{step}",
            recorded=recorded,
            record=lambda new: run.ledger.record_rollouts(phase.name, step, new),
            trains=True,
            upcoming=upcoming,
        )


def _nothing_left(run: Run, phase: PhasePlan, draw: Draw | None) -> str:
    """Why nothing can be drawn; an empty buffer is an error."""
    assert draw is not None
    if not len(draw):
        raise UserError(
            f"{phase.name}: its buffer is empty, no sample of the pool could be used when it was made; mend media_root "
            "or the files and start a new run"
        )
    counts = ", ".join(f"{count} {why}" for why, count in sorted(draw.spent().items()))
    return f"nothing left to draw of {len(draw)} samples: {counts}"


def _unusable(run: Run, phase: PhasePlan, batch: Batch, ids: list[str], before: dict[str, Damage]) -> dict[str, Damage]:
    """The samples of the steps in a row, this one the last, of which not one was usable; on rank 0. Collective."""
    damaged = usable.set_aside(run, dict.fromkeys(ids, "rl"), phase.horizon)
    practised = run.exchange.at_rank0([group.prompt.sample.id for group in batch.groups])
    return before | damaged if len(damaged) == len(ids) and not practised else {}


def _judge_unusable(run: Run, phase: PhasePlan, draw: Draw | None, barren: dict[str, Damage]) -> str:
    """Why the phase ends on samples that can't be used; empty where it goes on.

    It may where the rest was practised before. Where next to nothing was, or much is left, something is wrong with the
    data.
    """
    assert draw is not None
    left = draw.drawable()
    only_these = barren.keys() >= set(left)
    if not barren or not (only_these or len(barren) >= usable.ENOUGH):
        return ""
    if not only_these or len(draw) - len(left) < usable.SHARE * len(draw):
        raise usable.nothing_usable(run, phase.name, barren, len(left) if only_these else len(barren))
    return f"{_nothing_left(run, phase, draw)}; {usable.described(barren, len(draw))}"


def _judge(run: Run, phase: PhasePlan, draw: Draw, stagnation: Stagnation, step: int) -> Verdict:
    """Take the newest step's success counts in, on rank 0."""
    newest: list[Counts] = [
        group for group in run.ledger.groups(phase.name, before_step=step) if group.step == step - 1
    ]
    stagnation.add(newest, draw.update(newest))
    stagnation.exhausted = draw.exhausted()
    verdict = stagnation.verdict()
    draw.freeze(verdict.frozen)
    return verdict


def _report(
    run: Run, phase: PhasePlan, step: int, batch: Batch, result: RlResult, verdict: Verdict, seconds: float
) -> None:
    values: dict[str, float] = {**result.metrics, **batch.metrics, "time/step": seconds, "rl/stagnation": verdict.score}
    for name, task in verdict.tasks.items():
        values[f"rl/stagnation/{name}"] = task.score
        values[f"rl/success/{name}"] = task.success
    values |= {f"data/{name}": value for name, value in run.source.metrics().items()}
    run.metrics.log(run.step, values, phase=phase.name, phase_step=step)
    if step % run.config.output.log_interval == 0:
        run.say(_line(phase.name, step, values, seconds))


def _line(phase: str, step: int, values: Mapping[str, Any], seconds: float) -> str:
    shown = {"reward": "rl/reward", "success": "rl/success", "live": "rl/live_groups", "S": "rl/stagnation",
             "entropy": "rl/entropy", "grad": "train/grad_norm"}  # fmt: skip
    parts = [f"{name} {values[key]:.3f}" for name, key in shown.items() if values.get(key) is not None]
    return f"{phase} step {step:4d}  " + "  ".join(islice(parts, 8)) + f"  {seconds:.2f} s"
