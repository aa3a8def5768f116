"""The clock of one engine: set in the background as commanded, changes by others reported."""

import asyncio
from dataclasses import replace

from throttllem.core.types import ClockRead, FrequencyPlan, Reason
from throttllem.gateway.control.clock_setter import ClockSetter
from throttllem.gpu.device import Reading, Switch


class Wilful:
    """A GPU whose clock others may change, and which follows or not. `commanded` are the clocks that it was sent."""

    def __init__(self):
        self.commanded, self.reading, self.follows = [], Reading(clock_mhz=1400, watts=100.0, energy_j=0.0), True

    async def set_clock(self, mhz, sent=None):
        self.commanded.append(mhz)
        if sent is not None:
            sent()
        if self.follows and mhz is not None:
            self.reading = Reading(clock_mhz=mhz, watts=100.0, energy_j=0.0)
        return self.reading.planned_on_mhz

    def read(self):
        return self.reading


def clock(gpu, **more):
    """A clock setter, the events that it emits, and the seconds to each of its commands."""
    events, delays_s = [], []
    made = ClockSetter(name="x", gpu=gpu, reading=gpu.read, now=lambda: 5.0, on_command=delays_s.append, **more)
    made.begin(0, events.append, 1400)
    return made, events, delays_s


def plan(mhz):
    return FrequencyPlan(mhz=mhz, why=Reason.LOWEST_FEASIBLE)


def test_the_delay_of_a_command_counts_from_its_event_and_a_clock_read_follows():
    async def run():
        made, events, delays_s = clock(Wilful())
        made.set(plan(900), 4.75)
        await asyncio.gather(*made.tasks)
        return events, delays_s

    events, delays_s = asyncio.run(run())
    assert events == [ClockRead(engine=0, mhz=1400), ClockRead(engine=0, mhz=900)]
    assert delays_s == [0.25]


def test_a_clock_that_the_engine_does_not_run_at_is_reported_as_such():
    for more, reading in (
        ({"follows": False}, {}),
        ({}, {"dry_run_mhz": 900}),
        ({}, {"stands_for_mhz": 900}),
    ):
        gpu = Wilful()
        gpu.reading = Reading(clock_mhz=1400, watts=1.0, energy_j=0.0, **reading)
        _, events, _ = clock(gpu, **more)
        assert events == [ClockRead(engine=0, mhz=1400, followed=False)]


def test_a_change_by_others_is_reported_once():
    gpu = Wilful()
    made, events, _ = clock(gpu)
    made.look()
    gpu.reading = Reading(clock_mhz=700, watts=1.0, energy_j=0.0, limit_mhz=700, held="thermal")
    made.look()
    made.look()
    gpu.reading = Reading(clock_mhz=1400, watts=1.0, energy_j=0.0)
    made.look()
    assert events[1:] == [ClockRead(engine=0, mhz=700, limit_mhz=700), ClockRead(engine=0, mhz=1400)]


def test_nothing_is_reported_after_the_engine_is_gone():
    gpu = Wilful()
    made, events, _ = clock(gpu)
    made.end()
    gpu.reading = Reading(clock_mhz=700, watts=1.0, energy_j=0.0)
    made.look()
    assert events == [ClockRead(engine=0, mhz=1400)]


def test_a_clock_that_does_not_follow_is_set_once_a_second_at_most():
    async def run():
        gpu = Wilful()
        gpu.follows = False
        made, events, _ = clock(gpu)
        made.set(plan(900), 5.0)
        await asyncio.gather(*made.tasks)
        made.set(plan(900), 5.0)
        await asyncio.sleep(0.05)
        early = list(gpu.commanded)
        for task in made.tasks:
            task.cancel()
        return early, events[-1]

    assert asyncio.run(run()) == ([900], ClockRead(engine=0, mhz=1400))


def test_an_engine_that_is_gone_restores_the_clock():
    async def run():
        gpu = Wilful()
        made, _, _ = clock(gpu)
        made.free()
        await asyncio.gather(*made.tasks)
        return gpu.commanded

    assert asyncio.run(run()) == [None]


def test_a_command_for_an_engine_that_is_gone_is_not_sent_again():
    async def run():
        gpu = Wilful()
        gpu.follows = False
        made, _, _ = clock(gpu)
        made.set(plan(900), 5.0)
        await asyncio.gather(*made.tasks)
        made.set(plan(900), 5.0)  # waits for its next try
        await asyncio.sleep(0)
        made.end()
        made.free()
        await asyncio.gather(*made.tasks)
        return gpu.commanded

    assert asyncio.run(run()) == [900, None]


def test_a_switch_is_reported_once_with_the_clock_that_it_reached():
    gpu = Wilful()
    made, events, _ = clock(gpu)
    gpu.reading = Reading(clock_mhz=900, watts=1.0, energy_j=0.0, switch=Switch(mhz=900, seconds=0.012))
    made.look()
    gpu.reading = replace(gpu.reading, clock_mhz=700)
    made.look()
    gpu.reading = replace(gpu.reading, clock_mhz=900)
    made.look()
    assert events[1:] == [
        ClockRead(engine=0, mhz=900, switch_s=0.012),
        ClockRead(engine=0, mhz=700),
        ClockRead(engine=0, mhz=900),
    ]
