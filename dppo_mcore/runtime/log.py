"""One line a step on rank 0; every rank's own log file; metrics to JSON lines, TensorBoard and, if asked, W&B."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dppo_mcore.runtime.errors import UserError
from dppo_mcore.runtime.metric_names import unit_of

ROOT_LOGGER = "dppo_mcore"
REDRAW_S = 0.2
ERASE = "\x1b[K"
"""Clears a terminal's line from the cursor on."""
Item = TypeVar("Item")


def get_logger(name: str = "") -> logging.Logger:
    """The run's logger, or a named child of it."""
    return logging.getLogger(f"{ROOT_LOGGER}.{name}" if name else ROOT_LOGGER)


def start_logging(run: Path | None, rank: int) -> None:
    """Rank 0 logs to stdout; every rank to RUN/logs/rank-N.log. Library warnings go to the file only."""
    logger = get_logger()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    if rank == 0:
        screen = logging.StreamHandler(sys.stdout)
        screen.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(screen)
    if run is not None:
        folder = run / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank-{rank}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(file)
        logging.captureWarnings(True)
        logging.getLogger().handlers = [file]


class Metrics:
    """Writes a step's figures everywhere they are wanted. Only rank 0 writes; others hold a silent instance."""

    def __init__(self, run: Path | None, tensorboard: bool = True, wandb_project: str = "") -> None:
        self._file = None
        self._board: Any = None
        self._wandb: Any = None
        if run is None:
            return
        run.mkdir(parents=True, exist_ok=True)
        self._file = open(run / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"))
        if wandb_project:
            import wandb

            try:
                self._wandb = wandb.init(project=wandb_project, dir=str(run), resume="allow", id=run.name)
            except wandb.errors.Error as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"wandb: {reason}; WANDB_MODE=offline keeps the figures in {run / 'wandb'} until `wandb sync`"
                ) from error

    def log(self, step: int, values: Mapping[str, float], **labels: Any) -> None:
        """Record declared metrics at a global step; `labels` (phase, loop) stand beside them in metrics.jsonl."""
        for name in values:
            unit_of(name)
        if self._file is None:
            return
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **labels, **finite}) + "\n")
        if self._board is not None:
            for name, value in finite.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)
            self._board.flush()  # a rank that is ended leaves its threads behind
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, with a bar on rank 0's stderr while they come, only where a person's terminal is."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield from items
        return
    began = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown < REDRAW_S and done < total:
            continue
        shown, share = now, min(done / max(total, 1), 1.0)
        left = (now - began) * (1 - share) / share
        sys.stderr.write(f"\r{what} [{'#' * int(30 * share):<30}] {done}/{total}, {left:.0f} s left{ERASE}")
        sys.stderr.flush()
    sys.stderr.write(f"\r{ERASE}")
    sys.stderr.flush()
