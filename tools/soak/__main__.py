"""`make soak`: fault schedules against the keeper of clocks, many at a time, on fake GPUs.

`--one SEED` plays one again, with all that its processes said. Exits with 1 if any schedule failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # nobody forks a process with threads

from rich.console import Console

from tools.soak.crew import Crew
from tools.soak.draw import drawn
from tools.soak.evidence import Outcome
from tools.soak.figures import Tally
from tools.soak.schedule import Schedule
from tools.soak.shrink import shrunk
from tools.soak.stage import stage
from tools.testbed.report import ROOT, print_table, write_document

DOCUMENT = ROOT / "docs/evaluation/soak.md"
LANES, SCHEDULES = 8, 10_000
MOST_SHRUNK, TRIES, SAY_S, SHOWN, CALM = 10, 3, 10.0, 4_000, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every schedule held."""
    asked = _asked(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # nothing is left behind
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with stage(1 if asked.one is not None else asked.lanes) as lanes:
        if asked.one is not None:
            return _one(lanes, asked.one, console)
        return _many(lanes, asked, console)


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--schedules", type=int, default=SCHEDULES, help=f"how many ({SCHEDULES})")
    parser.add_argument("--seed", type=int, default=0, help="the first one's; the others follow")
    parser.add_argument("--lanes", type=int, default=LANES, help=f"schedules side by side ({LANES})")
    parser.add_argument("--one", type=int, metavar="SEED", help="only this one, with all logs")
    parser.add_argument("--document", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}")
    return parser.parse_args(arguments)


def _one(lanes: Crew, seed: int, console: Console) -> int:
    schedule = drawn(seed)
    console.print(schedule.words)
    (outcome,) = lanes.play([schedule])
    console.print(outcome.logs)
    took = ", ".join(f"{seconds * 1e3:.0f} ms" for seconds in outcome.restorings_s) or "none"
    console.print(
        f"{outcome.wall_s:.2f} s; restorings: {took}; requests: {outcome.complete} complete, "
        f"{outcome.told} told, {outcome.cut} cut"
    )
    return _end([outcome], console)


def _many(lanes: Crew, asked: argparse.Namespace, console: Console) -> int:
    tally, began_s, said_s = Tally(), time.monotonic(), time.monotonic()
    seeds = range(asked.seed, asked.seed + asked.schedules)
    for outcome in lanes.play(map(drawn, seeds)):
        tally.add(outcome)
        now_s = time.monotonic()
        if outcome.violations or now_s - said_s > SAY_S:
            said_s, done = now_s, len(tally.outcomes)
            rate = done / (now_s - began_s)
            console.print(f"{done}/{len(seeds)}, {rate:.1f} a second, {len(tally.failed)} failed{_failure(outcome)}")
    for outcome in lanes.play(tally.starved(), at_once=CALM):
        tally.add(outcome)
    wall_s = time.monotonic() - began_s
    for failure in tally.failed[:MOST_SHRUNK]:
        _shrink(lanes, failure, console)
    print_table(tally.table(), console)
    for line in tally.lines():
        console.print(line)
    if asked.document:
        section = tally.section(seed=asked.seed, wall_s=wall_s, lanes=asked.lanes)
        options = f"--schedules {asked.schedules} --seed {asked.seed} --lanes {asked.lanes}"
        write_document(section, DOCUMENT, command=f"python -m tools.soak {options} --document")
    console.print(f"{wall_s:.0f} s with {asked.lanes} lanes")
    return _end(tally.outcomes, console)


def _failure(outcome: Outcome) -> str:
    return f"; seed {outcome.schedule.seed}: {outcome.violations[0]}" if outcome.violations else ""


def _shrink(lanes: Crew, failure: Outcome, console: Console) -> None:
    """The smallest schedule that fails at least once in a few tries."""

    def fails(schedule: Schedule) -> bool:
        return any([outcome.violations for outcome in lanes.play([schedule] * TRIES)])

    console.rule(f"seed {failure.schedule.seed}")
    for violation in failure.violations:
        console.print(f"violated: {violation}")
    console.print(failure.logs[-SHOWN:])
    if fails(failure.schedule):
        console.print(f"smallest: {shrunk(failure.schedule, fails).words}")
    else:
        console.print(f"did not fail again in {TRIES} tries: {failure.schedule.words}")


def _end(outcomes: Sequence[Outcome], console: Console) -> int:
    failed = [outcome for outcome in outcomes if outcome.violations]
    for outcome in failed:
        console.print(f"failed: seed {outcome.schedule.seed}: {'; '.join(outcome.violations)}")
    console.print(f"{len(outcomes)} schedules: {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
