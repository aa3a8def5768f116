"""The fewest faults that still make a schedule fail: one after the other is left out, and stays out if it fails anyway.

Knows nothing of how schedules are played.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tools.soak.schedule import Schedule


def shrunk(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """`fails` plays it, more than once where chance has a say. The schedule itself is known to fail."""
    smaller = True
    while smaller:
        smaller = False
        for fault in schedule.faults:
            without = replace(schedule, faults=tuple(other for other in schedule.faults if other is not fault))
            if fails(without):
                schedule, smaller = without, True
                break
    return schedule
