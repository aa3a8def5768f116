"""One engine's life: reached, lost, reached again, let go; its clock beside all that."""

import asyncio

import pytest

from gateway.rig import outcome, rig, virtually
from throttllem.core.types import ClockRead, EngineLost, EngineReady, FrequencyPlan, Reason
from throttllem.engines.base import EngineError


def plan(mhz):
    return FrequencyPlan(mhz=mhz, why=Reason.FIXED)


def test_its_first_word_is_what_it_is_and_at_which_clock():
    async def run():
        async with rig() as it:
            await it.link.gpu.set_clock(600)
            await it.up()
            return [event for _, event, _ in it.seen.handled_], it.link.gpu.read().clock_mhz

    (ready, clock), in_force = virtually(run())
    assert isinstance(ready, EngineReady)
    assert (clock, in_force) == (ClockRead(engine=0, mhz=1400), 1400)


def test_one_that_is_lost_is_reached_again_under_another_id_and_said_once(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            await it.link.engine.kill(back=False)
            await asyncio.sleep(20.0)
            assert (it.link.state, it.link.trouble) == ("starting", "nobody is there")
            it.link.engine.gone = False
            await it.up()
            return it.link.trouble, it.seen.events(EngineLost), it.link.key

    trouble, lost, key = virtually(run())
    assert (trouble, len(lost), key) == (None, 1, 1)
    assert caplog.text.count("is not there") == 1


def test_whatever_goes_wrong_while_it_is_watched_it_is_lost_and_reached_again(caplog):
    async def run():
        async with rig() as it:
            healthy = it.link.engine.watch

            async def broken(tell):
                it.link.engine.watch = healthy
                raise ZeroDivisionError("a fault of ours")

            it.link.engine.watch = broken
            await it.up()
            await asyncio.sleep(0.5)
            return it.link.state, await it.ask() is not None

    assert virtually(run()) == ("up", True)
    assert "cannot be watched" in caplog.text


def test_whatever_goes_wrong_while_it_is_reached_it_is_tried_again(caplog):
    async def run():
        async with rig() as it:
            healthy = it.link.engine.connect

            async def broken():
                it.link.engine.connect = healthy
                raise ZeroDivisionError("a fault of ours")

            it.link.engine.connect = broken
            await asyncio.sleep(1.0)
            return it.link.state

    assert virtually(run()) == "up"
    assert "cannot be reached" in caplog.text


def test_a_clock_that_is_not_the_planned_one_is_put_back():
    async def run():
        async with rig() as it:
            await it.up()
            for mhz in (600, 1200, 800):
                it.link.clock.set(plan(mhz), 0.0)
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            return it.link.gpu.read().clock_mhz, it.link.clock.tasks

    assert virtually(run()) == (1400, set())


def test_what_is_told_of_one_that_was_let_go_goes_nowhere():
    async def run():
        async with rig() as it:
            await it.up()
            it.link.clock.set(plan(600), 0.0)
            it.link.retire()
            before = len(it.seen.handled_)
            it.link.token(1, 1)
            assert it.link.ended(1, 1) is None
            assert it.link.dropped(1) is None
            it.link.lose("again")
            await asyncio.sleep(1.0)
            return len(it.seen.handled_) - before

    assert virtually(run()) == 0


def test_a_well_engine_is_asked_once_for_many_doubts():
    async def run():
        async with rig() as it:
            await it.up()
            before, well = it.link.engine.looks, []
            for number in range(5):
                it.link.suspect(lambda number=number: well.append(number))
            await asyncio.sleep(0.01)
            return it.link.engine.looks - before, well

    assert virtually(run()) == (1, [0, 1, 2, 3, 4])


def looking(link, outcomes):
    """Its next looks end like this: an error or None."""
    left = iter(outcomes)

    async def well():
        link.engine.looks += 1
        if (error := next(left)) is not None:
            raise error

    link.engine.well = well


def refused():
    error = EngineError("cannot be reached")
    error.__cause__ = ConnectionRefusedError()
    return error


LATE = EngineError("did not answer in time", status=504)


@pytest.mark.parametrize(
    ("outcomes", "state", "looks"),
    [
        ([LATE, None], "up", 2),
        ([LATE, LATE, None], "up", 3),
        ([LATE, LATE, LATE], "starting", 3),
        ([LATE, refused()], "starting", 2),
        ([refused()], "starting", 1),
    ],
)
def test_one_look_that_fails_kills_nobody_unless_nobody_is_there(outcomes, state, looks):
    async def run():
        async with rig() as it:
            await it.up()
            other = asyncio.ensure_future(outcome(it.ask(tokens=200)))
            await asyncio.sleep(0.05)
            looking(it.link, outcomes)
            freed = []
            it.link.suspect(lambda: freed.append(it.link.engine.looks))
            while not freed:
                await asyncio.sleep(0.01)
            found = it.link.state
            return freed, found, await other

    freed, found, other = virtually(run())
    assert (freed, found) == ([looks], state)
    assert other == ("served" if state == "up" else "engine_lost")


def test_a_look_that_fails_by_a_fault_of_ours_frees_the_places_and_kills_nobody(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            freed = []
            looking(it.link, [ZeroDivisionError("a fault of ours"), None])
            it.link.suspect(lambda: freed.append(1))
            await asyncio.sleep(0.01)
            it.link.suspect(lambda: freed.append(2))
            await asyncio.sleep(0.01)
            return freed, it.link.state

    assert virtually(run()) == ([1, 2], "up")
    assert "cannot be looked at" in caplog.text


def test_a_clock_that_cannot_be_set_by_a_fault_of_ours_keeps_no_engine_down(caplog):
    async def run():
        async with rig() as it:

            async def broken(mhz, sent=None):
                raise ZeroDivisionError("a fault of ours")

            healthy, it.link.gpu.set_clock = it.link.gpu.set_clock, broken
            await it.up()
            served, trouble = await it.ask() is not None, it.link.trouble
            it.link.gpu.set_clock = healthy
            await asyncio.sleep(2.0)
            return served, trouble, it.link.trouble

    served, trouble, after = virtually(run())
    assert served
    assert "a fault of ours" in trouble
    assert after is None


def test_whatever_goes_wrong_while_it_is_taken_into_use_it_is_tried_again(caplog):
    async def run():
        async with rig() as it:

            def broken(spec, **more):
                raise ZeroDivisionError("a fault of ours")

            it.link.booking = Begins(it.link.booking, broken)
            await asyncio.sleep(1.0)
            before = it.link.state, it.link.trouble
            it.link.booking = it.link.booking.inner
            await it.up()
            return before, it.link.state, await outcome(it.ask())

    (state, trouble), after, served = virtually(run())
    assert (state, after, served) == ("starting", "up", "served")
    assert "a fault of ours" in trouble
    assert "cannot be taken into use" in caplog.text


class Begins:
    """A booking that begins otherwise."""

    def __init__(self, inner, begin):
        self.inner = inner
        self.begin = begin

    def __getattr__(self, name):
        return getattr(self.inner, name)
