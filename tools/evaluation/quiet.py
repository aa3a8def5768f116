"""Cores and priorities while something is timed, so that what else a machine does stays out of it.

Where it is allowed, what is timed runs in Linux's real-time class.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LEVEL = 10


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """This process, and those that it starts meanwhile, on one core; afterwards where it was before."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def first(pids: list[int]) -> Iterator[bool]:
    """These processes, and this one, before all others; whether it is allowed. Afterwards as usual."""
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
