"""One lane: a process that plays one schedule after the other, each in the same place, and says what became of it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from tools.soak.check import restorings_s, violations
from tools.soak.evidence import Evidence, Outcome
from tools.soak.place import Place, make_place
from tools.soak.play import play
from tools.soak.schedule import Schedule

MOST_LOG = 20_000


def serve(channel: Connection, folder: Path, library: Path) -> None:
    """Schedules in, outcomes out, until the other side hangs up."""
    with _place(folder, library) as place:
        while True:
            try:
                schedule: Schedule = channel.recv()
            except EOFError:
                return
            channel.send(played(schedule, place))


@contextmanager
def _place(folder: Path, library: Path) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="lane-", ignore_cleanup_errors=True) as mine:
        place = make_place(Path(mine), library)
        place.pulse.start()
        try:
            yield place
        finally:
            place.end()


def played(schedule: Schedule, place: Place) -> Outcome:
    """Play it, and judge."""
    began_s = time.monotonic()
    return judged(asyncio.run(play(schedule, place)), time.monotonic() - began_s)


def judged(evidence: Evidence, wall_s: float) -> Outcome:
    """The outcome of what was seen."""
    found = violations(evidence)
    hows = [ask.how for ask in evidence.asks.values()]
    return Outcome(
        schedule=evidence.schedule,
        violations=tuple(found),
        restorings_s=tuple(restorings_s(evidence)),
        complete=hows.count("complete"),
        told=hows.count("told"),
        cut=len(hows) - hows.count("complete") - hows.count("told"),
        wall_s=wall_s,
        idle=tuple(evidence.idle),
        starved_s=max([evidence.waited_s, *(gap.lasted_s for gap in evidence.gaps)]),
        logs=evidence.logs[-MOST_LOG:],
    )
