"""`make fuzz`: the properties of tests/fuzz for an hour, each module of them a target with its share of the time.

A failure is written into tests/fuzz/corpus, where it is an example from then on. Exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import settings

TESTS = Path(__file__).parents[2] / "tests"
MINUTES = 60.0
ROUND = 400
"""Examples of one property before the next one's turn: Hypothesis learns within a round what brings it further."""


@dataclass(slots=True, kw_only=True)
class Property:
    """One property as the runner sees it; `arguments`: of its last failure."""

    name: str
    test: Any
    executions: int = 0
    arguments: dict[str, Any] | None = None


@dataclass(slots=True, kw_only=True)
class Target:
    """A module of properties; `spent_s`: wall-clock time it had."""

    name: str
    properties: list[Property] = field(default_factory=list)
    spent_s: float = 0.0
    failures: int = 0

    @property
    def executions(self) -> int:
        """Of all its properties."""
        return sum(each.executions for each in self.properties)

    def figures(self) -> str:
        """One line of progress."""
        rate = self.executions / max(self.spent_s, 1e-9) * 60
        return f"{self.name:<16} {self.executions:>9,} executions {rate:>9,.0f} a minute {self.failures:>3} failures"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every property held."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="modules of tests/fuzz without test_ (all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all targets together ({MINUTES:g})")
    given = parser.parse_args(arguments)
    known = sorted(path.stem.removeprefix("test_") for path in (TESTS / "fuzz").glob("test_*.py"))
    if unknown := set(given.targets) - set(known):
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    sys.path.insert(0, str(TESTS))  # as pytest does
    properties = importlib.import_module("tests.fuzz.properties")
    settings.register_profile("fuzz", max_examples=ROUND * properties.FEWER, deadline=None, database=None)
    settings.load_profile("fuzz")
    targets = [_target(name) for name in given.targets or known]
    ends_s = time.monotonic() + given.minutes * 60
    failures = 0
    for place, target in enumerate(targets):
        share_s = (ends_s - time.monotonic()) / (len(targets) - place)
        failures += _run(target, time.monotonic() + share_s)
        print(target.figures(), flush=True)
    print(f"{sum(target.executions for target in targets):,} executions, {failures} failures", flush=True)
    return 1 if failures else 0


def _target(name: str) -> Target:
    module = importlib.import_module(f"tests.fuzz.test_{name}")
    tests = {key: value for key, value in vars(module).items() if getattr(value, "is_hypothesis_test", False)}
    return Target(name=name, properties=[Property(name=key, test=test) for key, test in tests.items()])


def _run(target: Target, ends_s: float) -> int:
    """Give a target its time, property by property; each that fails is not tried again. The number of failures."""
    left = list(target.properties)
    began_s = time.monotonic()
    while left and time.monotonic() < ends_s:
        for each in left[:]:
            share_s = max(0.5, (ends_s - time.monotonic()) / len(left))
            error = _round(each, min(ends_s, time.monotonic() + share_s))
            target.spent_s = time.monotonic() - began_s
            if error is not None:
                left.remove(each)
                target.failures += 1
                _report(target.name, each, error)
            if time.monotonic() >= ends_s:
                break
    return target.failures


def _round(each: Property, ends_s: float) -> BaseException | None:
    """Some examples of one property. Its failure, with its smallest arguments in `each`."""
    original: Callable[..., None] = each.test.hypothesis.inner_test
    failed = False

    def counted(**arguments: Any) -> None:
        nonlocal failed
        if not failed and time.monotonic() >= ends_s:
            return  # the rest of the round costs next to nothing
        each.executions += 1
        try:
            original(**arguments)
        except BaseException:  # Schemathesis' failures are no Exception
            failed, each.arguments = True, arguments
            raise

    each.test.hypothesis.inner_test = counted
    try:
        each.test()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return error
    finally:
        each.test.hypothesis.inner_test = original
    return None


def _report(target: str, each: Property, error: BaseException) -> None:
    """What failed, the file that holds it, and the command that repeats it."""
    traceback.print_exception(error, file=sys.stdout)
    path = (
        None
        if each.arguments is None
        else importlib.import_module("tests.fuzz.properties").keep(each.name, each.arguments)
    )
    if path is not None:
        print(f"written: {path.relative_to(TESTS.parent)}")
    print(f"repeat: .venv/bin/python -m pytest tests/fuzz/test_{target}.py -k {each.name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
