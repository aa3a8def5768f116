"""The core, or a command of it, fails: the requests that it was about end, the engine's state is built again, and
service goes on.
"""

import asyncio
import json

import pytest
from core.toy import CLOCKS_MHZ

from gateway.rig import outcome, rig, virtually
from tests.gateway.peer import answers, stream_and_whole, until, with_peer
from throttllem.core.types import (
    Arrived,
    Cancelled,
    ClockRead,
    Dispatch,
    EngineLost,
    EngineReady,
    Observed,
    Progressed,
    RateChanged,
    Stepped,
    Timer,
    Uncontrolled,
)


def failing(it, fails):
    """The core fails at every event that `fails` is true of; those events."""
    healthy, failed = it.loop.controller.handle, []

    def handle(event, now_s):
        if fails(event):
            failed.append(event)
            raise ZeroDivisionError("a fault of the core")
        return healthy(event, now_s)

    it.loop.controller.handle = handle
    return failed


def healed(it):
    del it.loop.controller.handle


# ---- the requests that an event or a command is about --------------------------------------------------------


def test_a_failure_at_an_arrival_ends_that_request_and_no_other(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            other = asyncio.ensure_future(outcome(it.request(tokens=30)))
            await asyncio.sleep(0.05)
            failing(it, lambda event: isinstance(event, Arrived))
            first = await outcome(it.request())
            healed(it)
            return first, await other, await outcome(it.request()), it.loop.open(), it.seen.calls

    first, other, after, still_open, calls = virtually(run())
    assert (first, other, after, still_open) == ("internal_error", "served", "served", ())
    assert "the control core failed at Arrived" in caplog.text
    assert [type(event) for _, event, commands in calls if commands is None] == [Arrived]


def test_a_failure_at_a_cancellation_leaves_nothing_open():
    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            failed = failing(it, lambda event: isinstance(event, Cancelled) and not failed)
            async with it.session() as session:
                await session.placed()
            assert len(failed) == 1
            return it.loop.open(), it.seen.ends

    still_open, ends = virtually(run())
    assert still_open == ()
    assert len(ends) == 1


def test_a_failure_at_one_request_from_within_another_ends_the_one_it_was_about():
    """Ending the first lets the second in; the core fails at the step in which the second starts."""

    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            first = asyncio.ensure_future(outcome(it.request(tokens=10)))
            second = asyncio.ensure_future(outcome(it.request(tokens=10)))
            await asyncio.sleep(0)
            failing(it, lambda event: isinstance(event, Stepped) and 2 in event.started)
            ends = await asyncio.gather(first, second)
            healed(it)
            return ends

    assert virtually(run()) == ["served", "internal_error"]


def test_a_failure_at_a_step_ends_what_started_in_it_and_frees_what_finished():
    async def run():
        async with rig() as it:
            await it.up()
            failed = failing(it, lambda event: isinstance(event, Stepped) and (event.started or event.finished))
            starts = await outcome(it.request())
            healed(it)
            await asyncio.sleep(3.0)
            failed = failing(it, lambda event: isinstance(event, Stepped) and event.finished)
            finishes = await outcome(it.request())
            freed = it.loop.controller.snapshot().engines[0]
            await asyncio.sleep(3.0)
            assert failed
            (view,) = it.loop.controller.snapshot().engines
            return starts, finishes, freed.running + freed.pending, view.running + view.pending

    assert virtually(run()) == ("internal_error", "served", 0, 0)


def test_a_failure_at_the_loss_of_an_engine_ends_its_requests():
    async def run():
        async with rig() as it:
            await it.up()
            requests = [asyncio.ensure_future(outcome(it.request(tokens=90, stream=n % 2 == 0))) for n in range(3)]
            await asyncio.sleep(0.1)
            failing(it, lambda event: isinstance(event, EngineLost))
            await it.backend.engine.kill()
            return await asyncio.wait_for(asyncio.gather(*requests), 1.0)

    assert set(virtually(run())) <= {"internal_error", "engine"}


def test_a_command_that_fails_keeps_no_other_from_being_carried_out(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            healthy = it.loop._carry_out

            def broken(command, now_s):
                if isinstance(command, Dispatch) and command.request_id == 1:
                    raise ZeroDivisionError("a fault of the loop")
                healthy(command, now_s)

            it.loop._carry_out = broken
            ends = await asyncio.gather(*(outcome(it.request()) for _ in range(3)))
            await asyncio.sleep(0.5)
            (view,) = it.loop.controller.snapshot().engines
            return ends, view.running + view.pending

    assert virtually(run()) == (["internal_error", "served", "served"], 0)
    assert "Dispatch could not be carried out" in caplog.text


def test_a_deadline_at_which_the_core_fails_is_tried_again_once_a_second():
    async def run():
        async with rig() as it:
            await it.up()
            await asyncio.sleep(1.0)
            failed = failing(it, lambda event: isinstance(event, Timer))
            it.loop.controller.next_deadline = lambda: 0.0
            it.loop._arm()
            await asyncio.sleep(5.0)
            count = len(failed)
            del it.loop.controller.next_deadline
            healed(it)
            return count, await outcome(it.request())

    count, after = virtually(run())
    assert count == pytest.approx(5, abs=1)
    assert after == "served"


# ---- the state of an engine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", [2**62, 2**63 - 2, 2**63, 2**70])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_state_that_an_iteration_has_ruined_is_built_again(tmp_path, iteration, busy):
    """Numbers that the columns of the scoreboard cannot hold: every request would fail at them until a restart."""

    async def health(there):
        status, page = await there.client.get("/health")
        return status, json.loads(page)["status"]

    async def check(there, peer):
        running = stream_and_whole(there, 4, 300) if busy else []
        await until(lambda: peer.open == len(running))
        there.loop.handle(Stepped(engine=there.backend.key, iteration=iteration))
        failures = 0
        while not (await answers(stream_and_whole(there, 1, 3)))[0].served:
            assert (await health(there))[1] == "degraded"
            failures += 1
        assert failures <= 3
        assert all(answer.served for answer in await answers(stream_and_whole(there, 8, 3)))
        assert await health(there) == (200, "ok")
        await answers(running)

    with_peer(check, tmp_path)


@pytest.mark.parametrize("kind", [Stepped, Progressed, Observed, ClockRead, EngineReady, EngineLost])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("half", [False, True], ids=["before", "after"])
def test_a_failure_at_an_engines_event_stops_service_for_moments(kind, times, half):
    """`half`: the core fails when it has taken the event in."""

    async def run():
        async with rig(numbered=True) as it:
            await it.up()
            healthy, count = it.loop.controller.handle, 0

            def handle(event, now_s):
                nonlocal count
                fails = isinstance(event, kind) and count < times
                count += fails
                if not fails or half:
                    found = healthy(event, now_s)
                if fails:
                    raise OverflowError("a fault of the core")
                return found

            it.loop.controller.handle = handle
            waiting = asyncio.ensure_future(outcome(it.request()))
            await asyncio.sleep(0.02)
            if kind in (EngineReady, EngineLost, ClockRead):
                await it.backend.engine.kill()
            if kind is Progressed:
                it.loop.handle(Progressed(engine=it.backend.key, request_id=99, tokens=1))
            await waiting
            await asyncio.sleep(6.0)
            if kind is Progressed:
                for _ in range(times - 1):
                    it.loop.handle(Progressed(engine=it.backend.key, request_id=99, tokens=1))
                    await asyncio.sleep(6.0)
            seen = [await outcome(it.request()) for _ in range(times)]
            await asyncio.sleep(6.0)
            return (
                count,
                seen[-1],
                await outcome(it.request()),
                it.models.health(),
                len(it.loop.controller.snapshot().engines),
            )

    count, _, last, health, engines = virtually(run())
    assert (count, last, health.up, health.degraded, engines) == (times, "served", 1, False, 1)


def test_an_engine_whose_clock_cannot_be_planned_is_built_again_and_requests_are_served(caplog):
    """The core fails at a timer, not at an event of the engine."""

    async def run():
        async with rig() as it:
            await it.up()
            plan = it.loop.controller._clocks.plan

            def planned(state, now_s, *, waiting):
                if state.engine == 0:
                    raise OverflowError("no clock makes sense")
                return plan(state, now_s, waiting=waiting)

            it.loop.controller._clocks.plan = planned
            first = await outcome(it.request(tokens=20))
            await asyncio.sleep(3.0)
            return first, await outcome(it.request()), it.backend.key, it.models.health().degraded

    first, second, key, degraded = virtually(run())
    assert first in ("served", "engine_lost")
    assert (second, key, degraded) == ("served", 1, False)
    assert "the control core failed at Timer" in caplog.text


def test_an_engine_is_connected_again_if_the_core_fails_at_several_arrivals():
    async def run():
        async with rig() as it:
            await it.up()
            first = it.backend.key
            failing(it, lambda event: isinstance(event, Arrived) and it.backend.key == first)
            seen, healths = [], []
            for _ in range(5):
                seen.append(await outcome(it.request()))
                healths.append(it.models.health().degraded)
                await asyncio.sleep(0.5)
                await it.up()
            return seen, healths

    broken = ["internal_error"] * 3
    assert virtually(run()) == ([*broken, "served", "served"], [True, True, True, False, False])


def test_a_core_that_always_fails_is_degraded_and_the_engine_is_left_in_peace():
    async def run():
        async with rig() as it:
            await it.up()
            failed = failing(it, lambda event: isinstance(event, Arrived))
            for _ in range(20):
                assert await outcome(it.request()) == "internal_error"
                assert it.models.health().degraded
                await asyncio.sleep(0.25)
            assert it.backend.engine.connects < 10
            return len(failed)

    assert virtually(run()) == 20


KINDS = [Arrived, Stepped, Progressed, Observed, Uncontrolled, RateChanged, ClockRead, Timer, Cancelled, EngineReady]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nth", [1, 3])
def test_after_a_fault_at_the_nth_event_of_a_kind_service_goes_on_without_a_restart(kind, nth):
    """Three faults in a row."""

    async def run():
        async with rig(numbered=True, max_batch=2) as it:
            await it.up()
            count, doubts = 0, 0

            def fails(event):
                nonlocal count
                count += isinstance(event, kind)
                return isinstance(event, kind) and nth <= count < nth + 3

            failed = failing(it, fails)
            for turn in range(12):
                key = it.backend.key or 0
                if kind is Progressed:
                    it.loop.handle(Progressed(engine=key, request_id=99, tokens=1))
                if kind is Uncontrolled:
                    it.loop.handle(Uncontrolled(engine=key, requests=turn % 2))
                if kind is ClockRead:
                    it.loop.handle(ClockRead(engine=key, mhz=CLOCKS_MHZ[-1]))
                if kind is RateChanged:
                    it.loop.handle(RateChanged(engine=key, tokens_per_step=1.0 + turn % 2))
                if kind is EngineReady and len(failed) < 3:
                    await it.backend.engine.kill()
                await asyncio.sleep(0.1)
                doubts += it.models.health().degraded
                leaves = {"disconnect_after": 2} if turn < 8 and kind is Cancelled else {}
                await asyncio.wait_for(outcome(it.request(tokens=10, **leaves)), 10.0)
            await asyncio.sleep(3.0)
            began_s = it.loop.now()
            ends = await asyncio.gather(*(outcome(it.request(tokens=5)) for _ in range(4)))
            seconds = it.loop.now() - began_s
            return len(failed), doubts, ends, seconds, it.models.health(), it.loop

    failed, doubts, ends, seconds, health, loop = virtually(run())
    assert failed == loop.core_faults == 3
    assert (ends, health.up, health.degraded) == (["served"] * 4, 1, False)
    assert seconds < 5.0
    assert loop.engine_rebuilds >= 1 and doubts >= (kind is not Arrived)


def test_a_state_in_doubt_runs_at_the_maximum_clock_until_it_is_built_again():
    """The second fault comes within a second of the first, so that the engine is not connected again at once."""

    async def run():
        async with rig() as it:
            await it.up()
            requests = [asyncio.ensure_future(outcome(it.request(tokens=150))) for _ in range(2)]
            device = it.backend.accounting.gpu
            while device.read().clock_mhz == CLOCKS_MHZ[-1]:
                await asyncio.sleep(0.01)
            below_mhz = device.read().clock_mhz
            it.loop._rebuilt_s[it.backend.name] = it.loop.now()
            failed = failing(it, lambda event: isinstance(event, ClockRead) and not failed)
            it.loop.handle(ClockRead(engine=it.backend.key, mhz=below_mhz))
            healed(it)
            seen = []
            for _ in range(8):
                await asyncio.sleep(0.1)
                seen.append(device.read().clock_mhz)
            await asyncio.gather(*requests)
            await asyncio.sleep(3.0)
            return below_mhz, seen, await outcome(it.request())

    below_mhz, seen, after = virtually(run())
    assert below_mhz < CLOCKS_MHZ[-1]
    assert seen == [CLOCKS_MHZ[-1]] * 8
    assert after == "served"
