"""Runs simple test modules where pytest is not installed: parametrize, raises, approx, skip, no fixtures.

`python tools/bare_pytest.py [--jobs N] tests/kernels/test_policy_loss.py ...` prints a line per failure and a summary.
With jobs the cases are dealt out to so many processes: on a GPU most of the time goes into compiling kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import itertools
import math
import re
import subprocess
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


def run(path: str, part: int = 0, parts: int = 1) -> tuple[int, int, list[str]]:
    """Passed, skipped and failed tests of one file, or of every `parts`-th case from the `part`-th on."""
    name = ".".join(Path(path).resolve().relative_to(ROOT).with_suffix("").parts)
    passed, skipped, failed = 0, 0, []
    module = importlib.import_module(name)
    number = -1
    for test, function in list(vars(module).items()):
        if not test.startswith("test_"):
            continue
        for cases in itertools.product(*getattr(function, "cases", [])):
            number += 1
            if number % parts != part:
                continue
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


def run_part(paths: list[str], part: int, parts: int) -> tuple[int, int, int]:
    """Run one part of the cases of all files in this process, and print what failed."""
    for folder in (ROOT, ROOT / "kernels", ROOT / "tools"):
        sys.path.insert(0, str(folder))
    install()
    totals, failures = [0, 0], []
    for path in paths:
        passed, skipped, failed = run(path, part, parts)
        totals = [totals[0] + passed, totals[1] + skipped]
        failures += failed
        print(f"{path}: {passed} passed, {skipped} skipped, {len(failed)} failed", flush=True)
    for failure in failures:
        print(f"FAILED {failure}")
    return totals[0], totals[1], len(failures)


def run_jobs(paths: list[str], jobs: int) -> tuple[int, int, int]:
    """The same in `jobs` processes at once."""
    command = [sys.executable, __file__, *paths, "--jobs", str(jobs), "--part"]
    children = [
        subprocess.Popen([*command, str(part)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for part in range(jobs)
    ]
    totals = [0, 0, 0]
    for part, child in enumerate(children):
        output = child.communicate()[0]
        print(f"-- process {part + 1} of {jobs}\n{output}", flush=True)
        counts = re.search(r"^(\d+) passed, (\d+) skipped, (\d+) failed$", output, re.MULTILINE)
        found = [int(count) for count in counts.groups()] if counts else [0, 0, 1]
        totals = [total + count for total, count in zip(totals, found, strict=True)]
    return totals[0], totals[1], totals[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="FILE")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes to spread the cases over")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is None and options.jobs > 1:
        totals = run_jobs(options.paths, options.jobs)
    else:
        totals = run_part(options.paths, options.part or 0, options.jobs)
    print("{} passed, {} skipped, {} failed".format(*totals))
    sys.exit(bool(totals[2]))


if __name__ == "__main__":
    main()
