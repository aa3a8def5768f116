"""`make soak`: fault schedules against the keeper of clocks, many at a time, on fake GPUs.

`--one SEED` plays one again, with the logs of its processes. Exits with 1 if any schedule failed.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from tools.soak.draw import drawn, smallest
from tools.soak.evidence import Outcome
from tools.soak.figures import Tally
from tools.soak.pool import WorkerPool
from tools.soak.sandbox import sandboxes
from tools.soak.schedule import Schedule
from tools.testbed.report import ROOT, print_table, write_document

DOCUMENT = ROOT / "docs/evaluation/soak.md"
WORKERS, SCHEDULES = 8, 10_000
MOST_SHRUNK, TRIES, REPORT_S, SHOWN, CALM = 10, 3, 10.0, 4_000, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every schedule held."""
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--schedules", type=int, default=SCHEDULES, help=f"how many ({SCHEDULES})")
    parser.add_argument("--seed", type=int, default=0, help="the first one's; the others follow")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"schedules side by side ({WORKERS})")
    parser.add_argument("--one", type=int, metavar="SEED", help="only this one, with all logs")
    parser.add_argument("--document", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # nothing is left behind
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with sandboxes(1 if given.one is not None else given.workers) as places:
        pool = WorkerPool(places)
        if given.one is not None:
            return asyncio.run(_one(pool, given.one, console))
        return asyncio.run(_many(pool, given, console))


async def _one(pool: WorkerPool, seed: int, console: Console) -> int:
    schedule = drawn(seed)
    console.print(schedule.words)
    (outcome,) = await pool.played([schedule])
    console.print(outcome.logs)
    took = ", ".join(f"{seconds * 1e3:.0f} ms" for seconds in outcome.restorings_s) or "none"
    requests = f"{outcome.complete} complete, {outcome.errors} errors, {outcome.cut} cut"
    console.print(f"{outcome.wall_s:.2f} s; restorings: {took}; requests: {requests}")
    return _end([outcome], console)


async def _many(pool: WorkerPool, given: argparse.Namespace, console: Console) -> int:
    tally, began_s, reported_s = Tally(), time.monotonic(), time.monotonic()
    seeds = range(given.seed, given.seed + given.schedules)
    async for outcome in pool.play(map(drawn, seeds)):
        tally.add(outcome)
        now_s = time.monotonic()
        if outcome.violations or now_s - reported_s > REPORT_S:
            reported_s, done = now_s, len(tally.outcomes)
            rate = done / (now_s - began_s)
            console.print(f"{done}/{len(seeds)}, {rate:.1f} a second, {len(tally.failed)} failed{_failure(outcome)}")
    async for outcome in pool.play(tally.starved(), at_once=CALM):
        tally.add(outcome)
    wall_s = time.monotonic() - began_s
    for failure in tally.failed[:MOST_SHRUNK]:
        await _shrink(pool, failure, console)
    print_table(tally.table(), console)
    for line in tally.lines():
        console.print(line)
    if given.document:
        section = tally.section(seed=given.seed, wall_s=wall_s, workers=given.workers)
        options = f"--schedules {given.schedules} --seed {given.seed} --workers {given.workers}"
        write_document(section, DOCUMENT, command=f"python -m tools.soak {options} --document")
    console.print(f"{wall_s:.0f} s with {given.workers} workers")
    return _end(tally.outcomes, console)


def _failure(outcome: Outcome) -> str:
    return f"; seed {outcome.schedule.seed}: {outcome.violations[0]}" if outcome.violations else ""


async def _shrink(pool: WorkerPool, failure: Outcome, console: Console) -> None:
    """The smallest schedule that fails at least once in a few tries."""

    async def fails(schedule: Schedule) -> bool:
        return any([outcome.violations for outcome in await pool.played([schedule] * TRIES)])

    console.rule(f"seed {failure.schedule.seed}")
    for violation in failure.violations:
        console.print(f"violated: {violation}")
    console.print(failure.logs[-SHOWN:])
    if await fails(failure.schedule):
        console.print(f"smallest: {(await smallest(failure.schedule, fails)).words}")
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
