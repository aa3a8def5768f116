"""Schedules from seeds: the same one each time, every kind among few, and only what can be played."""

import asyncio
from dataclasses import replace

import pytest

from tools.soak.bed import CLOCKS_MHZ
from tools.soak.draw import COMMON_MHZ, drawn, smallest
from tools.soak.faults import KINDS
from tools.soak.faults.kind import Journal
from tools.soak.keeper_process import POINTS, TRAPS
from tools.soak.schedule import Fault, Stop

SEEDS = range(300)


@pytest.fixture(scope="module")
def schedules():
    return [drawn(seed) for seed in SEEDS]


def test_a_seed_is_a_schedule(schedules):
    assert schedules == [drawn(seed) for seed in SEEDS]
    assert len({schedule.words for schedule in schedules}) == len(SEEDS)


def test_every_kind_and_every_end_is_drawn(schedules):
    assert {kind for schedule in schedules for kind in schedule.kinds} == set(KINDS)
    assert {schedule.stop for schedule in schedules} == set(Stop)
    assert {len(schedule.faults) for schedule in schedules} == {1, 2, 3, 4}
    assert {(schedule.early, schedule.lift_s < 0) for schedule in schedules} == {
        (early, first) for early in (True, False) for first in (True, False)
    }


def test_there_are_many_kinds():
    assert len(KINDS) >= 60
    assert len([kind for kind in KINDS if "dies" in kind]) >= 10


def test_one_gpu_at_least_is_not_opted_in_and_one_is_held(schedules):
    for schedule in schedules:
        assert any(gpu.allowed is None for gpu in schedule.gpus)
        assert sum(gpu.held for gpu in schedule.gpus) in (1, 2, 4)
        assert len(schedule.gpus) <= 6
        assert not any(gpu.held and gpu.allowed is None for gpu in schedule.gpus)


def test_locks_of_before_come_in_all_three_kinds_and_none_is_a_clock_of_the_gateway(schedules):
    gpus = [gpu for schedule in schedules for gpu in schedule.gpus if gpu.held]
    assert {(gpu.before is None, gpu.declared) for gpu in gpus} == {(True, False), (False, False), (False, True)}
    assert not [gpu for gpu in gpus if gpu.before and set(gpu.before) & {*CLOCKS_MHZ, COMMON_MHZ}]
    assert any(gpu.before and not gpu.allowed[0] <= gpu.before[1] <= gpu.allowed[1] for gpu in gpus)


def test_every_keeper_allows_the_clock_of_the_fresh_client(schedules):
    ranges = [gpu.allowed for schedule in schedules for gpu in schedule.gpus if gpu.allowed]
    assert all(low <= COMMON_MHZ <= high for low, high in ranges)


def test_both_copies_of_the_journal_are_never_lost_by_two_faults(schedules):
    for schedule in schedules:
        hits = [fault for fault in schedule.faults if KINDS[fault.kind].journal is not Journal.NOTHING]
        assert len({fault.copy for fault in hits}) <= 1
        both = [fault for fault in hits if KINDS[fault.kind].journal is Journal.BOTH]
        assert not both or len(hits) == 1


def test_traps_are_of_points_that_there_are_and_fit_on_the_board(schedules):
    for schedule in schedules:
        traps = [fault for fault in schedule.faults if fault.kind.startswith("keeper: dies")]
        assert len(traps) <= TRAPS
    assert len(set(POINTS)) == len(POINTS)


# ---- the smallest part that fails ----------------------------------------------------------------------------

FAULTS = tuple(Fault(kind=name, at_s=at_s) for at_s, name in enumerate("abcdef"))
WHOLE = replace(drawn(0), faults=FAULTS)


def reduced(schedule, *needed):
    """The smallest of those that fail as all of these faults are in them, and how many were tried."""
    tried = []

    async def fails(one):
        tried.append(one.kinds)
        return set(needed) <= one.kinds

    return asyncio.run(smallest(schedule, fails)), len(tried)


def test_a_pair_is_found():
    found, tried = reduced(WHOLE, "b", "e")
    assert found == replace(WHOLE, faults=(FAULTS[1], FAULTS[4]))
    assert tried < 25


def test_nothing_is_left_out_of_what_is_needed():
    assert reduced(WHOLE, *"abcdef")[0] == WHOLE


def test_a_schedule_that_fails_without_any_fault_has_none():
    assert reduced(WHOLE)[0].faults == ()
