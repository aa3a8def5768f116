"""The fewest faults that still fail, found with a runner that only looks at the schedule."""

from dataclasses import replace

from tools.soak.draw import drawn
from tools.soak.schedule import Fault
from tools.soak.shrink import shrunk

FAULTS = tuple(Fault(kind=name, at_s=at_s) for at_s, name in enumerate("abcdef"))
SCHEDULE = replace(drawn(0), faults=FAULTS)


def failing(*needed):
    """Fails if all of these are in it, and counts how often it was asked."""
    asked = []

    def fails(schedule):
        asked.append(schedule.kinds)
        return set(needed) <= schedule.kinds

    return fails, asked


def test_a_pair_is_found():
    fails, asked = failing("b", "e")
    found = shrunk(SCHEDULE, fails)
    assert [fault.kind for fault in found.faults] == ["b", "e"]
    assert found == replace(SCHEDULE, faults=(FAULTS[1], FAULTS[4]))
    assert len(asked) < 25


def test_nothing_is_left_out_of_what_is_needed():
    fails, _ = failing("a", "b", "c", "d", "e", "f")
    assert shrunk(SCHEDULE, fails) == SCHEDULE


def test_a_schedule_that_fails_without_any_fault_has_none():
    assert shrunk(SCHEDULE, lambda _: True).faults == ()
