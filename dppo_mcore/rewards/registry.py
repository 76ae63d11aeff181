"""Objectives by name. `@objective("counting")` registers a scorer; users add theirs by a file or an entry point.

A scorer takes the sample and the extracted final answer (normalised text) and returns a task reward in [0, 1].
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path

from dppo_mcore.types import Sample

Scorer = Callable[[Sample, str], float]
ENTRY_POINT_GROUP = "dppo_mcore.objectives"
_SCORERS: dict[str, Scorer] = {}


def objective(name: str) -> Callable[[Scorer], Scorer]:
    """Register the decorated scorer under `name`; a later one of the same name takes its place."""

    def register(scorer: Scorer) -> Scorer:
        _SCORERS[name] = scorer
        return scorer

    return register


def scorer_of(name: str) -> Scorer:
    """Scorer of an objective."""
    if name not in _SCORERS:
        raise KeyError(f"no scorer for objective {name!r}; known: {', '.join(sorted(_SCORERS))}")
    return _SCORERS[name]


def known_objectives() -> tuple[str, ...]:
    """Names of all registered objectives."""
    return tuple(sorted(_SCORERS))


def without_scorer(rows: Mapping[str, int]) -> str:
    """What is wrong with objectives, given with their rows, that no scorer is known for; empty where all have one."""
    from dppo_mcore.config_loading import nearest  # what workers import is kept small

    known = known_objectives()
    unknown = [f"{name!r} ({count} rows{nearest(name, known)})" for name, count in rows.items() if name not in known]
    return f"no scorer for objective {', '.join(unknown)}; known: {', '.join(known)}" if unknown else ""


def load_objectives(file: str = "") -> None:
    """Register scorers of installed packages (entry points) and of a Python file, if given."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        entry.load()
    if not file:
        return
    path = Path(file).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"objectives: no file {path}")
    name = f"dppo_user_objectives_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"objectives: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
