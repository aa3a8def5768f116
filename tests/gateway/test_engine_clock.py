"""The clock of one engine: commands beside whatever goes on, and changes by others noticed."""

import asyncio

from core.toy import CLOCKS_MHZ, spec, table

from throttllem.core.types import ClockRead, FrequencyPlan, Reason
from throttllem.gateway.control.clock_setter import ClockSetter
from throttllem.gateway.energy.savings_estimate import SavingsEstimate
from throttllem.gpu.device import Reading, Work


class Moody:
    """A GPU that is where somebody else puts it. `asked` are the clocks that were asked for."""

    def __init__(self):
        self.asked, self.reading, self.follows = [], Reading(clock_mhz=1400, watts=100.0, energy_j=0.0), True

    async def set_clock(self, mhz, sent=None):
        self.asked.append(mhz)
        if sent is not None:
            sent()
        if self.follows and mhz is not None:
            self.reading = Reading(clock_mhz=mhz, watts=100.0, energy_j=0.0)
        return self.reading.planned_on_mhz

    def read(self):
        return self.reading

    def worked(self, work):
        pass

    def idled(self, seconds):
        pass


def clock(gpu, **more):
    told, commands = [], []
    made = ClockSetter(name="x", gpu=gpu, reading=gpu.read, now=lambda: 5.0, on_command=commands.append, **more)
    made.begin(0, told.append, 1400)
    return made, told, commands


def plan(mhz):
    return FrequencyPlan(mhz=mhz, why=Reason.LOWEST_FEASIBLE)


def test_a_command_is_timed_from_its_event_and_answered():
    async def run():
        made, told, commands = clock(Moody())
        made.set(plan(900), 4.75)
        await asyncio.gather(*made.tasks)
        return told, commands

    told, commands = asyncio.run(run())
    assert told == [ClockRead(engine=0, mhz=1400), ClockRead(engine=0, mhz=900)]
    assert commands == [0.25]


def test_what_others_do_to_the_clock_is_told_once():
    gpu = Moody()
    made, told, _ = clock(gpu)
    made.look()
    gpu.reading = Reading(clock_mhz=700, watts=1.0, energy_j=0.0, limit_mhz=700, held="thermal")
    made.look()
    made.look()
    gpu.reading = Reading(clock_mhz=1400, watts=1.0, energy_j=0.0)
    made.look()
    assert told[1:] == [ClockRead(engine=0, mhz=700, limit_mhz=700), ClockRead(engine=0, mhz=1400)]


def test_nothing_is_told_of_an_engine_that_is_gone():
    gpu = Moody()
    made, told, _ = clock(gpu)
    made.end()
    gpu.reading = Reading(clock_mhz=700, watts=1.0, energy_j=0.0)
    made.look()
    assert told == [ClockRead(engine=0, mhz=1400)]


def test_a_clock_that_does_not_follow_is_asked_for_once_a_second_at_most():
    async def run():
        gpu = Moody()
        gpu.follows = False
        made, told, _ = clock(gpu)
        made.set(plan(900), 5.0)
        await asyncio.gather(*made.tasks)
        made.set(plan(900), 5.0)
        await asyncio.sleep(0.05)
        early = list(gpu.asked)
        for task in made.tasks:
            task.cancel()
        return early, told[-1]

    assert asyncio.run(run()) == ([900], ClockRead(engine=0, mhz=1400))


def test_giving_back_is_a_clock_of_nobody():
    async def run():
        gpu = Moody()
        made, _, _ = clock(gpu)
        made.free()
        await asyncio.gather(*made.tasks)
        return gpu.asked

    assert asyncio.run(run()) == [None]


def test_what_advised_clocks_would_have_saved():
    """An engine at the top, advised to go lower: an estimate below what it took; where clocks are set there is none."""

    def energy(advised_mhz):
        gpu = Moody()
        made = spec(max_batch=64, kv_blocks=2000)
        law = table(made)
        meter = EnergyMeter(gpu=gpu, top=SavingsEstimate(table=law), advised=SavingsEstimate(table=law))
        meter.begin(made)
        for number in range(1, 1500):
            gpu.reading = Reading(clock_mhz=1400, watts=100.0, energy_j=3.0 * number, dry_run_mhz=advised_mhz)
            work = Work(seconds=0.03, decode_sequences=2, kv_tokens=80, prefill_tokens=0, prefill_pairs=0.0)
            prefills = ((number, 4),) if number % 20 == 0 else ()
            meter.step(Step(work=work, rows=2, kv_blocks=20, prefills=prefills))
        return meter.energy()

    advised, top, real = energy(CLOCKS_MHZ[0]), energy(CLOCKS_MHZ[-1]), energy(None)
    assert 0.1 < advised.would_save < 0.8 and advised.saved == 0.0
    assert top.would_save == 0.0
    assert real.would_save is None and real.advised_j is None


def test_what_an_engine_asked_for_that_is_gone_is_not_set_any_more():
    async def run():
        gpu = Moody()
        gpu.follows = False
        made, _, _ = clock(gpu)
        made.set(plan(900), 5.0)
        await asyncio.gather(*made.tasks)
        made.set(plan(900), 5.0)  # waits for its next try
        await asyncio.sleep(0)
        made.end()
        made.free()
        await asyncio.gather(*made.tasks)
        return gpu.asked

    assert asyncio.run(run()) == [900, None]
