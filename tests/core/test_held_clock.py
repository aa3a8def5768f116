"""GPUs that do not follow: the core plans by what their clocks come to, and asks no more than it must."""

import pytest

from core.stories import SIZES, arrive, options, world
from core.toy import TOP_MHZ
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.types import ClockRead, Reason, SetClock, Slo


def read(told, mhz, limit_mhz=None):
    return [c for c in told.tell(ClockRead(engine=0, mhz=mhz, limit_mhz=limit_mhz)) if isinstance(c, SetClock)]


def plan(told):
    return told.controller.snapshot().engines[0].plan


def settled(told):
    told.now_s += 1.0  # no switch is under way


def test_a_clock_that_is_held_down_is_not_asked_for_again_and_again():
    told = world(options(ClockPolicy.TOP, aware=False))
    arrive(told, 1)
    settled(told)
    assert read(told, 800, limit_mhz=800) == []
    assert read(told, 810, limit_mhz=810) == []


def test_one_that_somebody_set_without_holding_it_is():
    told = world(options(ClockPolicy.TOP, aware=False))
    arrive(told, 1)
    settled(told)
    assert [command.plan.mhz for command in read(told, 800)] == [TOP_MHZ]


def test_held_down_a_promise_that_no_clock_keeps_any_more_is_known_to_be_lost():
    told = world(options(ClockPolicy.THROTTLLEM))
    arrive(told, 1, 4, 40, slo=Slo(e2e_s=0.85))
    assert (plan(told).mhz, plan(told).why) == (1000, Reason.LOWEST_FEASIBLE)
    read(told, 800, limit_mhz=800)
    assert (plan(told).mhz, plan(told).why) == (TOP_MHZ, Reason.LOST_RUNNING)


@pytest.mark.parametrize(("limit_mhz", "lost"), [(None, 0), (600, 1)])
def test_admission_knows_that_the_top_clock_is_not_to_be_had(limit_mhz, lost):
    told = world(options(ClockPolicy.THROTTLLEM))
    settled(told)
    read(told, limit_mhz or TOP_MHZ, limit_mhz)
    arrive(told, 1, 4, 40, slo=Slo(e2e_s=0.75))
    assert told.controller.snapshot().engines[0].lost_requests == lost


def test_when_nothing_holds_it_any_more_it_is_planned_anew():
    told = world(options(ClockPolicy.LEAST_ENERGY))
    arrive(told, 1, 4, 40, slo=Slo(e2e_s=2.0))
    settled(told)
    read(told, 800, limit_mhz=800)
    table = told.controller._engines.by_id[0].table
    assert table.limit_mhz == 800
    read(told, 800)
    assert told.controller._engines.by_id[0].table is table.base is told.controller.options.tables[1]


def test_a_limit_of_an_engine_without_a_table_is_no_fault():
    told = world(options(ClockPolicy.TOP, aware=False, tables={}))
    arrive(told, 1)
    settled(told)
    assert read(told, 800, limit_mhz=800) == []


@pytest.mark.parametrize("policy", list(ClockPolicy))
def test_whatever_the_limit_every_request_ends(policy):
    told = world(options(policy))
    for key in range(1, 7):
        arrive(told, key, 4, 20, slo=Slo(e2e_s=1.0))
    for limit_mhz in (1000, 600, None, 700):
        settled(told)
        read(told, limit_mhz or TOP_MHZ, limit_mhz)
    told.run_out(SIZES.get)
    assert told.controller.snapshot().counts.finished == 6
