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
            await it.backend.gpu.set_clock(600)
            await it.up()
            return [event for _, event, _ in it.seen.handled_], it.backend.gpu.read().clock_mhz

    (ready, clock), in_force = virtually(run())
    assert isinstance(ready, EngineReady)
    assert (clock, in_force) == (ClockRead(engine=0, mhz=1400), 1400)


def test_one_that_is_lost_is_reached_again_under_another_id_and_said_once(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            await it.backend.engine.kill(back=False)
            await asyncio.sleep(20.0)
            assert (it.backend.state, it.backend.trouble) == ("starting", "nobody is there")
            it.backend.engine.gone = False
            await it.up()
            return it.backend.trouble, it.seen.events(EngineLost), it.backend.key

    trouble, lost, key = virtually(run())
    assert (trouble, len(lost), key) == (None, 1, 1)
    assert caplog.text.count("is not there") == 1


def test_whatever_goes_wrong_while_it_is_watched_it_is_lost_and_reached_again(caplog):
    async def run():
        async with rig() as it:
            healthy = it.backend.engine.watch

            async def broken(tell):
                it.backend.engine.watch = healthy
                raise ZeroDivisionError("a fault of ours")

            it.backend.engine.watch = broken
            await it.up()
            await asyncio.sleep(0.5)
            return it.backend.state, await it.ask() is not None

    assert virtually(run()) == ("up", True)
    assert "cannot be watched" in caplog.text


def test_whatever_goes_wrong_while_it_is_reached_it_is_tried_again(caplog):
    async def run():
        async with rig() as it:
            healthy = it.backend.engine.connect

            async def broken():
                it.backend.engine.connect = healthy
                raise ZeroDivisionError("a fault of ours")

            it.backend.engine.connect = broken
            await asyncio.sleep(1.0)
            return it.backend.state

    assert virtually(run()) == "up"
    assert "cannot be reached" in caplog.text


def test_a_clock_that_is_not_the_planned_one_is_put_back():
    async def run():
        async with rig() as it:
            await it.up()
            for mhz in (600, 1200, 800):
                it.backend.clock.set(plan(mhz), 0.0)
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            return it.backend.gpu.read().clock_mhz, it.backend.clock.tasks

    assert virtually(run()) == (1400, set())


def test_what_is_told_of_one_that_was_let_go_goes_nowhere():
    async def run():
        async with rig() as it:
            await it.up()
            it.backend.clock.set(plan(600), 0.0)
            it.backend.retire()
            before = len(it.seen.handled_)
            it.backend.token(1, 1)
            assert it.backend.ended(1, 1) is None
            assert it.backend.dropped(1) is None
            it.backend.lose("again")
            await asyncio.sleep(1.0)
            return len(it.seen.handled_) - before

    assert virtually(run()) == 0


def test_a_well_engine_is_asked_once_for_many_doubts():
    async def run():
        async with rig() as it:
            await it.up()
            before, well = it.backend.engine.looks, []
            for number in range(5):
                it.backend.suspect(lambda number=number: well.append(number))
            await asyncio.sleep(0.01)
            return it.backend.engine.looks - before, well

    assert virtually(run()) == (1, [0, 1, 2, 3, 4])


def looking(backend, outcomes):
    """Its next looks end like this: an error or None."""
    left = iter(outcomes)

    async def well():
        backend.engine.looks += 1
        if (error := next(left)) is not None:
            raise error

    backend.engine.well = well


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
            looking(it.backend, outcomes)
            freed = []
            it.backend.suspect(lambda: freed.append(it.backend.engine.looks))
            while not freed:
                await asyncio.sleep(0.01)
            found = it.backend.state
            return freed, found, await other

    freed, found, other = virtually(run())
    assert (freed, found) == ([looks], state)
    assert other == ("served" if state == "up" else "engine_lost")


def test_a_look_that_fails_by_a_fault_of_ours_frees_the_places_and_kills_nobody(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            freed = []
            looking(it.backend, [ZeroDivisionError("a fault of ours"), None])
            it.backend.suspect(lambda: freed.append(1))
            await asyncio.sleep(0.01)
            it.backend.suspect(lambda: freed.append(2))
            await asyncio.sleep(0.01)
            return freed, it.backend.state

    assert virtually(run()) == ([1, 2], "up")
    assert "cannot be looked at" in caplog.text


def test_a_clock_that_cannot_be_set_by_a_fault_of_ours_keeps_no_engine_down(caplog):
    async def run():
        async with rig() as it:

            async def broken(mhz, sent=None):
                raise ZeroDivisionError("a fault of ours")

            healthy, it.backend.gpu.set_clock = it.backend.gpu.set_clock, broken
            await it.up()
            served, trouble = await it.ask() is not None, it.backend.trouble
            it.backend.gpu.set_clock = healthy
            await asyncio.sleep(2.0)
            return served, trouble, it.backend.trouble

    served, trouble, after = virtually(run())
    assert served
    assert "a fault of ours" in trouble
    assert after is None


def test_whatever_goes_wrong_while_it_is_taken_into_use_it_is_tried_again(caplog):
    async def run():
        async with rig() as it:

            def broken(spec, **more):
                raise ZeroDivisionError("a fault of ours")

            it.backend.accounting = Begins(it.backend.accounting, broken)
            await asyncio.sleep(1.0)
            before = it.backend.state, it.backend.trouble
            it.backend.accounting = it.backend.accounting.inner
            await it.up()
            return before, it.backend.state, await outcome(it.ask())

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
