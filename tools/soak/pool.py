"""Workers that play schedules side by side, each in its sandbox; outcomes come in any order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing

from tools.soak.check import restorings_s, violations
from tools.soak.evidence import Evidence, Outcome
from tools.soak.play import play
from tools.soak.sandbox import Sandbox
from tools.soak.schedule import Schedule

MOST_LOG = 20_000
_LATE_S = 120.0


class StuckError(Exception):
    """A schedule does not end; the message names its seed."""


class WorkerPool:
    """One worker per sandbox."""

    def __init__(self, sandboxes: Sequence[Sandbox]) -> None:
        self._sandboxes = sandboxes

    async def play(self, schedules: Iterable[Schedule], at_once: int | None = None) -> AsyncIterator[Outcome]:
        """Each schedule's outcome; `at_once`: with fewer workers than there are. Raises StuckError."""
        waiting, outcomes = iter(schedules), asyncio.Queue[Outcome]()
        workers = [asyncio.create_task(_work(one, waiting, outcomes)) for one in self._sandboxes[:at_once]]
        pulse = asyncio.create_task(self._sandboxes[0].pulse.run())
        try:
            while not outcomes.empty() or not all(worker.done() for worker in workers):
                coming = asyncio.create_task(outcomes.get())
                await asyncio.wait({coming, *workers}, return_when=asyncio.FIRST_COMPLETED)
                for worker in workers:
                    if worker.done():
                        worker.result()  # raises what it failed with
                if coming.done():
                    yield coming.result()
                else:
                    coming.cancel()
        finally:
            for task in (pulse, *workers):
                task.cancel()
            await asyncio.gather(pulse, *workers, return_exceptions=True)

    async def played(self, schedules: Iterable[Schedule]) -> list[Outcome]:
        """The same, all of them."""
        async with aclosing(self.play(schedules)) as outcomes:  # type: ignore[type-var]
            return [outcome async for outcome in outcomes]


async def _work(sandbox: Sandbox, waiting: Iterator[Schedule], outcomes: asyncio.Queue[Outcome]) -> None:
    for schedule in waiting:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(_LATE_S):
                evidence = await play(schedule, sandbox)
        except TimeoutError as error:
            raise StuckError(f"seed {schedule.seed}: not played after {_LATE_S:.0f} s") from error
        outcomes.put_nowait(judged(evidence, time.monotonic() - began_s))


def judged(evidence: Evidence, wall_s: float) -> Outcome:
    """The outcome of what was seen."""
    hows = [ask.how for ask in evidence.asks.values()]
    return Outcome(
        schedule=evidence.schedule,
        violations=tuple(violations(evidence)),
        restorings_s=tuple(restorings_s(evidence)),
        complete=hows.count("complete"),
        errors=hows.count("error"),
        cut=len(hows) - hows.count("complete") - hows.count("error"),
        wall_s=wall_s,
        idle=tuple(evidence.idle),
        starved_s=max([evidence.waited_s, *(gap.lasted_s for gap in evidence.gaps)]),
        logs=evidence.logs[-MOST_LOG:],
    )
