"""Greedy evaluation of a checkpoint: success by objective, dimension and source with 95% intervals, answers kept.

    [torchrun ...] python -m dppo_mcore.evaluate --model DIR --data FILE --out OUT.json [--engine NAME] [options]

Prints a table and writes JSON. --load takes the weights from a training checkpoint. Options are those of the trainer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dppo_mcore import config_checks
from dppo_mcore.config import Config
from dppo_mcore.config_loading import ConfigError, fail, load, override
from dppo_mcore.runtime import faults
from dppo_mcore.runtime.errors import UserError
from dppo_mcore.runtime.files import replacing


def evaluate(config: Config, out: Path) -> None:
    """Answer every sample of `--data` and write the summary."""
    from dppo_mcore.metaloop.evaluation import answer_pool, summarise
    from dppo_mcore.metaloop.run import close_run, open_evaluation

    run = open_evaluation(config, config.data.data)
    samples, answers = answer_pool(run, "eval", config.output.eval_samples)
    damaged = run.exchange.at_rank0(list(run.source.quarantine.entries()))
    if run.exchange.rank == 0:
        if not samples and damaged:
            raise UserError(
                f"data: none of {len(damaged)} samples can be used, the first: {damaged[0]}; is media_root right?"
            )
        summary = summarise(samples, answers)
        rows = [
            {"id": sample.id, "objective": sample.objective, "dimension": sample.dimension, "source": sample.source,
             "gold": sample.gold, "text": answer.rollout.text, "reward": answer.reward, "parts": dict(answer.parts),
             "success": answer.success, "tokens": len(answer.rollout.token_ids),
             "finish_reason": answer.rollout.finish_reason, "error": answer.error}
            for sample, answer in zip(samples, answers, strict=True)
        ]  # fmt: skip
        content = {"model": config.run.model, "load": config.run.load, "data": config.data.data,
                   "skipped": len(run.pools["eval"]) - len(rows), "summary": summary, "answers": rows}  # fmt: skip
        with replacing(out) as file:
            json.dump(content, file, indent=1, default=str)
        print(f"weights of {config.run.load or config.run.model}\n{table(summary)}")
    close_run(run)


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text: one line per objective, dimension and source, the whole last."""
    lines = [f"{'':44} {'n':>6} {'success':>8}  95% interval     {'task':>6} {'format':>6}"]
    for name in ("objective", "dimension", "source"):
        lines += [_row(f"{name} {key}", entry) for key, entry in summary[name].items()]
    return "\n".join([*lines, _row("all", summary["all"])])


def _row(name: str, entry: Mapping[str, Any]) -> str:
    if not entry:
        return f"{name:44} {0:6d}"
    interval = f"[{entry['low']:.3f}, {entry['high']:.3f}]"
    return (
        f"{name:44} {entry['n']:6d} {entry['success']:8.3f}  {interval:15}  {entry['task']:6.3f} {entry['format']:6.3f}"
    )


def parse(arguments: Sequence[str]) -> tuple[Config, Path]:
    """The configuration and the output file."""
    rest: list[str] = []
    out = ""
    iterator = iter(arguments)
    for argument in iterator:
        name, _, value = argument.partition("=")
        if name == "--out":
            out = value or next(iterator, "")
        elif name == "--engine":
            rest += ["--rollout-engine", value or next(iterator, "")]
        else:
            rest.append(argument)
    config = load(rest, "python -m dppo_mcore.evaluate", __doc__ or "")
    given = {argument.partition("=")[0] for argument in rest}
    if "--model" in given and "--load" not in given:
        config = override(config, load="")  # a run's own file may name the checkpoint that the run began with
    if not out:
        raise ConfigError("--out: a file for the result is needed")
    if not config.data.data:
        raise ConfigError("data: a manifest is needed")
    return config, Path(out)


def main() -> None:
    """Command line."""
    try:
        config, out = parse(sys.argv[1:])
    except ConfigError as error:
        fail(error)
    config_checks.check_or_exit(config, training=False)

    def guarded() -> None:
        try:
            evaluate(config, out)
        except faults.Preempted:
            raise UserError("stopped by SIGTERM before the last answer; nothing was written") from None

    faults.run_guarded(guarded)


if __name__ == "__main__":
    main()
