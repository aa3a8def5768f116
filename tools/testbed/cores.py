"""Cores and priorities while something is timed, so that other work on the machine stays out of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LEVEL = 10


@contextmanager
def pinned(cores: Iterable[int]) -> Iterator[None]:
    """This process, and those that it starts meanwhile, on these cores; afterwards where it was before."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def real_time(pids: Iterable[int]) -> Iterator[bool]:
    """These processes and this one in Linux's real-time class; whether that is allowed. Afterwards as usual."""
    everyone = [*pids, os.getpid()]
    try:
        yield all([_set(pid, os.SCHED_RR, _LEVEL) for pid in everyone])
    finally:
        for pid in everyone:
            _set(pid, os.SCHED_OTHER, 0)


def _set(pid: int, policy: int, level: int) -> bool:
    """Every thread of a process; False if it is not allowed."""
    allowed = True
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                os.sched_setscheduler(int(task.name), policy, os.sched_param(level))
            except PermissionError:
                allowed = False
            except ProcessLookupError:
                continue
    return allowed
