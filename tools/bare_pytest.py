"""Runs simple test modules where pytest is not installed: parametrize, raises, approx, skip, no fixtures.

`python tools/bare_pytest.py tests/kernels/test_policy_loss.py ...` prints a line per failure and a summary.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import math
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class SkippedError(Exception):
    """A test that does not apply here."""


class Approx:
    """Equal within a relative tolerance of 1e-6, or as given."""

    def __init__(self, expected: float, rel: float | None = None, abs: float | None = None) -> None:  # noqa: A002
        self._expected = expected
        self._within = max(abs or 0.0, math.fabs(expected) * (rel if rel is not None else 0.0 if abs else 1e-6), 1e-12)

    def __eq__(self, other: object) -> bool:
        return math.fabs(float(other) - self._expected) <= self._within  # type: ignore[arg-type]


@contextlib.contextmanager
def raises(kind: type[BaseException], match: str = "") -> Iterator[None]:
    """The block must raise `kind` with a matching message."""
    try:
        yield
    except kind as error:
        assert re.search(match, str(error)), f"{error!r} does not match {match!r}"
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


def parametrize(names: str, values: Any, ids: Any = None) -> Callable[[Any], Any]:
    """Remember the cases on the function."""

    def mark(function: Any) -> Any:
        split = [name.strip() for name in names.split(",")]
        cases = [dict(zip(split, value if len(split) > 1 else [value], strict=True)) for value in values]
        function.cases = [*getattr(function, "cases", []), cases]
        return function

    return mark


def importorskip(name: str) -> Any:
    """The module, or skip."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SkippedError(str(error)) from error


def skip(reason: str) -> None:
    raise SkippedError(reason)


class _Marks:
    parametrize = staticmethod(parametrize)

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        return lambda function: function


def install() -> None:
    """Answer `import pytest`."""
    module: Any = types.ModuleType("pytest")
    module.raises, module.approx, module.skip, module.importorskip = raises, Approx, skip, importorskip
    module.mark = _Marks()
    sys.modules["pytest"] = module


def run(path: str) -> tuple[int, int, list[str]]:
    """Passed, skipped and failed tests of one file."""
    name = ".".join(Path(path).resolve().relative_to(ROOT).with_suffix("").parts)
    passed, skipped, failed = 0, 0, []
    module = importlib.import_module(name)
    for test, function in list(vars(module).items()):
        if not test.startswith("test_"):
            continue
        for cases in itertools.product(*getattr(function, "cases", [])):
            arguments = {key: value for case in cases for key, value in case.items()}
            if set(inspect.signature(function).parameters) - set(arguments):
                skipped += 1
                continue
            try:
                function(**arguments)
                passed += 1
            except SkippedError:
                skipped += 1
            except Exception:
                failed.append(f"{name}::{test}{list(arguments.values())}\n{traceback.format_exc(limit=-4)}")
    return passed, skipped, failed


def main() -> None:
    for folder in (ROOT, ROOT / "kernels", ROOT / "tools"):
        sys.path.insert(0, str(folder))
    install()
    totals, failures = [0, 0], []
    for path in sys.argv[1:]:
        passed, skipped, failed = run(path)
        totals = [totals[0] + passed, totals[1] + skipped]
        failures += failed
        print(f"{path}: {passed} passed, {skipped} skipped, {len(failed)} failed", flush=True)
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{totals[0]} passed, {totals[1]} skipped, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
