"""Several lanes side by side: schedules are dealt out as lanes become free, outcomes come back in any order."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tools.soak.evidence import Outcome
from tools.soak.lane import serve
from tools.soak.schedule import Schedule

_LATE_S = 120.0
_END_S = 10.0


class StuckError(Exception):
    """A lane does not answer any more; the message names the seeds that were under way."""


class Crew:
    """Lanes that wait for schedules."""

    def __init__(self, lanes: list[tuple[BaseProcess, Connection]]) -> None:
        self._lanes = lanes

    def play(self, schedules: Iterable[Schedule], at_once: int | None = None) -> Iterator[Outcome]:
        """Each one's outcome, as they come; `at_once` on fewer lanes than there are. Raises StuckError."""
        waiting = iter(schedules)
        busy: dict[Connection, Schedule] = {}
        for _, channel in self._lanes[:at_once]:
            _deal(channel, waiting, busy)
        while busy:
            ready = [channel for channel in wait(list(busy), _LATE_S) if isinstance(channel, Connection)]
            if not ready:
                raise StuckError(f"no lane answers; under way: {sorted(one.seed for one in busy.values())}")
            for channel in ready:
                seed = busy.pop(channel).seed
                try:
                    outcome: Outcome = channel.recv()
                except EOFError as error:
                    raise StuckError(f"the lane of seed {seed} has ended") from error
                _deal(channel, waiting, busy)
                yield outcome


def _deal(channel: Connection, waiting: Iterator[Schedule], busy: dict[Connection, Schedule]) -> None:
    schedule = next(waiting, None)
    if schedule is not None:
        busy[channel] = schedule
        channel.send(schedule)


@contextmanager
def crew(count: int, folder: Path, library: Path) -> Iterator[Crew]:
    """So many lanes, which have all that this process has imported; it must have no other thread. They end with it."""
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if threads > 1:
        raise StuckError(f"this process has {threads} threads, and cannot be forked: set OPENBLAS_NUM_THREADS=1")
    fork = multiprocessing.get_context("fork")
    lanes: list[tuple[BaseProcess, Connection]] = []
    lane: BaseProcess
    try:
        for _ in range(count):
            mine, its = fork.Pipe()
            lane = fork.Process(target=_lane, args=(its, [mine, *(channel for _, channel in lanes)], folder, library))
            lane.start()
            its.close()
            lanes.append((lane, mine))
        yield Crew(lanes)
    finally:
        for _, channel in lanes:
            channel.close()
        for lane, _ in lanes:
            lane.join(_END_S)
            if lane.is_alive():
                lane.kill()


def _lane(channel: Connection, others: list[Connection], folder: Path, library: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:  # else nobody would hear the last one hang up
        other.close()
    serve(channel, folder, library)
