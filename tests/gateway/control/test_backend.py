"""One engine's life: connected, watched, suspected, lost, connected again, retired; its iterations by timer where
nothing else shows them.
"""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gateway.rig import outcome, rig, virtually
from throttllem.config import LimitOptions
from throttllem.core.types import Cancelled, ClockRead, EngineLost, EngineReady, FrequencyPlan, Reason, Stepped
from throttllem.engines.base import EngineError, OwnLimitError


def plan(mhz):
    return FrequencyPlan(mhz=mhz, why=Reason.FIXED)


# ---- life ----------------------------------------------------------------------------------------------------


def test_it_first_reports_its_spec_and_its_clock():
    async def run():
        async with rig() as it:
            await it.backend.gpu.set_clock(600)
            await it.up()
            return [event for _, event, _ in it.seen.calls[:2]], it.backend.gpu.read().clock_mhz

    (ready, clock), in_force = virtually(run())
    assert isinstance(ready, EngineReady)
    assert (clock, in_force) == (ClockRead(engine=0, mhz=1400), 1400)


def test_what_an_engine_lacks_is_logged_when_it_is_up(caplog):
    async def run():
        async with rig() as it:
            connect = it.backend.engine.connect

            async def with_a_note():
                return replace(await connect(), notes=("max_batch: 256 is assumed",))

            it.backend.engine.connect = with_a_note
            await it.up()
            return it.backend.name

    with caplog.at_level("INFO"):
        name = virtually(run())
    assert f"engine {name}: max_batch: 256 is assumed" in caplog.text


def test_a_lost_engine_is_connected_again_under_another_key_and_logged_once(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            await it.backend.engine.kill(back=False)
            await asyncio.sleep(20.0)
            assert (it.backend.state, it.backend.trouble) == ("starting", "connection refused")
            it.backend.engine.gone = False
            await it.up()
            return it.backend.trouble, it.seen.events(EngineLost), it.backend.key

    trouble, lost, key = virtually(run())
    assert (trouble, len(lost), key) == (None, 1, 1)
    assert caplog.text.count("is not taken into use") == 1


def test_an_error_while_it_is_watched_loses_it_and_it_is_connected_again(caplog):
    async def run():
        async with rig() as it:
            healthy = it.backend.engine.watch

            async def broken(emit):
                it.backend.engine.watch = healthy
                raise ZeroDivisionError("a fault of ours")

            it.backend.engine.watch = broken
            await it.up()
            await asyncio.sleep(0.5)
            return it.backend.state, await it.request() is not None

    assert virtually(run()) == ("up", True)
    assert "cannot be watched" in caplog.text


def test_an_error_while_it_is_connected_is_logged_and_it_is_tried_again(caplog):
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


def test_an_error_while_it_is_taken_into_use_is_shown_and_it_is_tried_again(caplog):
    class Begins:
        """An accounting that begins otherwise."""

        def __init__(self, inner, begin):
            self.inner = inner
            self.begin = begin

        def __getattr__(self, name):
            return getattr(self.inner, name)

    async def run():
        async with rig() as it:

            def broken(*_):
                raise ZeroDivisionError("a fault of ours")

            it.backend.accounting = Begins(it.backend.accounting, broken)
            await asyncio.sleep(1.0)
            before = it.backend.state, it.backend.trouble
            it.backend.accounting = it.backend.accounting.inner
            await it.up()
            return before, it.backend.state, await outcome(it.request())

    (state, trouble), after, served = virtually(run())
    assert (state, after, served) == ("starting", "up", "served")
    assert "a fault of ours" in trouble
    assert "cannot be taken into use" in caplog.text


def test_a_retired_engine_emits_nothing():
    async def run():
        async with rig() as it:
            await it.up()
            await asyncio.sleep(1.0)
            it.backend.clock.set(plan(600), 0.0)
            it.backend.retire()
            before = len(it.seen.calls)
            it.backend.ended(1, 1)
            assert it.backend.left(1) is None
            it.backend.lose("again")
            await asyncio.sleep(1.0)
            return len(it.seen.calls) - before

    assert virtually(run()) == 0


def test_a_session_that_outlives_its_engine_emits_nothing():
    async def run():
        async with rig() as it:
            await it.up()
            async with it.session() as session:
                await session.placed()
                it.backend.retire()
                before = len(it.seen.events(Stepped))
                session.tokens(1)
                session.finish(1)
                after = len(it.seen.events(Stepped))
            return after - before, it.backend.in_flight

    assert virtually(run()) == (0, 0)


# ---- its clock -----------------------------------------------------------------------------------------------


def test_a_clock_that_is_not_the_planned_one_is_set_again():
    async def run():
        async with rig() as it:
            await it.up()
            for mhz in (600, 1200, 800):
                it.backend.clock.set(plan(mhz), 0.0)
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            return it.backend.gpu.read().clock_mhz, it.backend.clock.tasks

    assert virtually(run()) == (1400, set())


def test_a_clock_that_cannot_be_set_for_a_fault_of_ours_keeps_no_engine_down(caplog):
    async def run():
        async with rig() as it:

            async def broken(mhz, sent=None):
                raise ZeroDivisionError("a fault of ours")

            healthy, it.backend.gpu.set_clock = it.backend.gpu.set_clock, broken
            await it.up()
            served, trouble = await it.request() is not None, it.backend.trouble
            it.backend.gpu.set_clock = healthy
            await asyncio.sleep(2.0)
            return served, trouble, it.backend.trouble

    served, trouble, after = virtually(run())
    assert served
    assert "a fault of ours" in trouble
    assert after is None


# ---- suspicion -----------------------------------------------------------------------------------------------


def cancellations(it):
    return [event.request_id for event in it.seen.events(Cancelled)]


def test_one_check_answers_many_suspicions():
    async def run():
        async with rig() as it:
            await it.up()
            before = it.backend.engine.checks
            for number in range(5):
                it.backend.suspect(if_healthy=Cancelled(request_id=100 + number))
            await asyncio.sleep(0.01)
            return it.backend.engine.checks - before, cancellations(it)

    assert virtually(run()) == (1, [100, 101, 102, 103, 104])


def test_a_suspicion_during_a_check_is_checked_after_it():
    async def run():
        async with rig() as it:
            await it.up()
            before, inner = it.backend.engine.checks, it.backend.engine.well

            async def slow():
                await inner()
                await asyncio.sleep(1.0)

            it.backend.engine.well = slow
            it.backend.suspect(if_healthy=Cancelled(request_id=100))
            await asyncio.sleep(0.5)
            it.backend.suspect(if_healthy=Cancelled(request_id=101))
            await asyncio.sleep(0.6)
            early = cancellations(it)
            await asyncio.sleep(1.0)
            return it.backend.engine.checks - before, early, cancellations(it)

    assert virtually(run()) == (2, [100], [100, 101])


def checking(backend, outcomes):
    """Its next checks end like this: an error or None."""
    left = iter(outcomes)

    async def well():
        backend.engine.checks += 1
        if (error := next(left)) is not None:
            raise error

    backend.engine.well = well


def refused():
    error = EngineError("cannot be reached")
    error.__cause__ = ConnectionRefusedError()
    return error


LATE = EngineError("did not answer in time", status=504)


@pytest.mark.parametrize(
    ("outcomes", "state", "checks"),
    [
        ([LATE, None], "up", 2),
        ([LATE, LATE, None], "up", 3),
        ([LATE, LATE, LATE], "starting", 3),
        ([LATE, refused()], "starting", 2),
        ([refused()], "starting", 1),
        ([OwnLimitError("no descriptor")] * 3, "up", 3),
        ([OwnLimitError("no descriptor"), refused()], "starting", 2),
    ],
)
def test_one_failed_check_loses_no_engine_unless_the_connection_is_refused(outcomes, state, checks):
    async def run():
        async with rig() as it:
            await it.up()
            other = asyncio.ensure_future(outcome(it.request(tokens=200)))
            await asyncio.sleep(0.05)
            checking(it.backend, outcomes)
            it.backend.suspect(if_healthy=Cancelled(request_id=100))
            while not cancellations(it) and it.backend.state == "up":
                await asyncio.sleep(0.01)
            found = it.backend.engine.checks, it.backend.state
            assert bool(cancellations(it)) == (state == "up"), "a lost engine's requests may be elsewhere by now"
            return found, await other

    found, other = virtually(run())
    assert found == (checks, state)
    assert other == ("served" if state == "up" else "engine_lost")


def test_a_check_that_fails_for_a_fault_of_ours_frees_the_places_and_loses_no_engine(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            checking(it.backend, [ZeroDivisionError("a fault of ours"), None])
            it.backend.suspect(if_healthy=Cancelled(request_id=100))
            await asyncio.sleep(0.01)
            it.backend.suspect(if_healthy=Cancelled(request_id=101))
            await asyncio.sleep(0.01)
            return cancellations(it), it.backend.state

    assert virtually(run()) == ([100, 101], "up")
    assert "cannot be checked" in caplog.text


@pytest.mark.parametrize(("after_s", "state"), [(0.9, "up"), (1.2, "stalled")])
def test_an_engine_that_holds_requests_without_progress_has_stalled(after_s, state):
    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=2.0)) as it:
            await it.up()
            async with it.session() as session:
                await session.placed()
                await asyncio.sleep(after_s)
                found = it.backend.health(2.0), it.models.health().degraded
            return *found, it.backend.health(2.0)

    (found, why), degraded, after = virtually(run())
    assert (found, degraded, after) == (state, state == "stalled", ("up", None))
    assert (why is None) == (state == "up")


# ---- iterations by timer -------------------------------------------------------------------------------------


def steps(it):
    return len(it.seen.events(Stepped))


def test_a_timer_advances_iterations_where_nothing_shows_them():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            await it.request(tokens=60, stream=False)
            during = steps(it)
            await asyncio.sleep(5.0)
            return during, steps(it), it.loop.now()

    during, after, spent_s = virtually(run())
    assert 30 <= during <= 90, spent_s
    assert after == during


def test_a_timer_takes_over_when_the_last_stream_has_ended():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            streamed = asyncio.ensure_future(it.request(tokens=20))
            await asyncio.sleep(0.1)
            whole = asyncio.ensure_future(it.request(tokens=120, stream=False))
            await streamed
            before = steps(it)
            await whole
            return steps(it) - before

    assert 40 <= virtually(run()) <= 180


def test_a_timer_advances_iterations_of_an_engine_whose_reports_number_no_steps():
    """Its metrics page shows how many sequences run, no more."""

    async def run():
        async with rig(mute=True) as it:
            await it.up()
            whole = asyncio.ensure_future(it.request(tokens=60, stream=False))
            it.backend._reported(report())
            await asyncio.sleep(0.1)
            it.backend._reported(report(running=1))
            before = steps(it)
            await whole
            return steps(it) - before

    def report(running=0):
        return SimpleNamespace(
            step=None, joules=None, prompt_tokens=None, running=running, waiting=0, kv_blocks=None, seconds=None
        )

    assert 20 <= virtually(run()) <= 90


def test_no_timer_runs_where_streams_show_the_iterations():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            await it.request(tokens=60)
            return it.backend._timer, max(event.iteration for event in it.seen.events(Stepped))

    assert virtually(run()) == (None, 59)


def test_the_timer_goes_on_after_a_fault(caplog):
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            whole = asyncio.ensure_future(it.request(tokens=120, stream=False))
            await asyncio.sleep(0.2)

            def broken():
                it.backend.progress.tick = type(it.backend.progress).tick.__get__(it.backend.progress)
                raise ZeroDivisionError("a fault of ours")

            it.backend.progress.tick = broken
            await asyncio.sleep(0.1)
            before = steps(it)
            await whole
            return steps(it) - before

    assert virtually(run()) > 20
    assert "a fault of ours" in caplog.text
