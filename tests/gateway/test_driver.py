"""The loop: every request ends exactly once whatever happens, nothing is lost, and every joule is somebody's."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.rig import asked, outcome, rig, virtually
from throttllem.config import LimitOptions
from throttllem.core.admission import AdmissionOptions
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.types import (
    Cancelled,
    EngineReady,
    Reject,
    Slo,
)
from throttllem.engines.base import EngineError
from throttllem.gateway.control.rejections import RejectedError

SHORT = LimitOptions(queue_wait_s=2.0, engine_wait_s=1.0, silence_s=1.0)


# ---- anything may happen -------------------------------------------------------------------------------------

MODES = {"named": {}, "streams": {"mute": True}, "steps": {"numbered": True}}
VISIT = st.fixed_dictionaries(
    {
        "after_s": st.floats(0.0, 0.6),
        "tokens": st.integers(1, 30),
        "stream": st.booleans(),
        "choices": st.integers(1, 3),
        "count": st.integers(1, 40),
        "slo": st.sampled_from([Slo(), Slo(e2e_s=0.3), Slo(e2e_s=5.0, tbt_s=0.1), Slo(ttft_s=0.2)]),
        "hang_up_after": st.none() | st.integers(1, 20),
        "cancel_after_s": st.none() | st.floats(0.0, 0.8),
    }
)
CASE = {
    "mode": st.sampled_from(sorted(MODES)),
    "policy": st.sampled_from([ClockPolicy.LEAST_ENERGY, ClockPolicy.THROTTLLEM, ClockPolicy.TOP]),
    "rejects": st.booleans(),
    "queue": st.sampled_from([2, 100]),
    "visits": st.lists(VISIT, min_size=1, max_size=12),
    "kills_s": st.lists(st.tuples(st.floats(0.0, 0.5), st.floats(0.0, 1.5)), max_size=2),
}


async def one(it, after_s, cancel_after_s, **more):
    await asyncio.sleep(after_s)
    task = asyncio.ensure_future(outcome(it.ask(**more)))
    if cancel_after_s is not None:
        asyncio.get_running_loop().call_later(cancel_after_s, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        return "cancelled"


async def kills(it, times):
    for after_s, back_s in times:
        await asyncio.sleep(after_s)
        await it.backend.engine.kill(back=back_s < 0.3)
        await asyncio.sleep(back_s)
        it.backend.engine.gone = False


async def anything(mode, policy, rejects, queue, visits, kills_s):
    admission = AdmissionOptions(unmeetable="reject" if rejects else "serve", queue_limit=queue)
    async with rig(policy=policy, limits=SHORT, core={"admission": admission}, **MODES[mode]) as it:
        await it.up()
        killing = asyncio.ensure_future(kills(it, kills_s))
        ends = await asyncio.gather(*(one(it, **visit) for visit in visits))
        await killing
        it.models.status()
        assert not it.loop.open()
        board = it.loop.controller.snapshot()
        assert board.queue == 0
        if it.backend.state == "up":
            await asyncio.sleep(1.0)  # the engine has told of everything by now
            (view,) = it.loop.controller.snapshot().engines
            assert (view.running, view.pending) == (0, 0)
            assert it.backend.accounting.ledger.open_j() == pytest.approx(0.0, abs=1e-9)
        return ends, it.seen.ends


@settings(max_examples=25, deadline=None)
@given(**CASE)
def test_every_request_ends_once_and_every_joule_is_somebodys(**case):
    ends, seen = virtually(anything(**case))
    assert set(ends) <= {
        *("served", "left", "cancelled", "engine", "engine_lost", "queue_full", "slo_unmeetable"),
        *("no_engine", "queue_timeout", "engine_silent", "too_many_sequences"),
    }
    # A task that was cancelled before its first step never came in.
    assert len(ends) - ends.count("cancelled") <= len(seen) <= len(ends)
    for visit, kept in seen:
        assert visit.ended
        assert kept is None or visit.request.slo != Slo()


# ---- ends ----------------------------------------------------------------------------------------------------


def test_a_request_that_never_fits_is_turned_away_at_once():
    async def run():
        async with rig() as it:
            await it.up()
            with pytest.raises(RejectedError) as refused:
                await it.ask(count=10, tokens=300)
            return refused.value, it

    error, it = virtually(run())
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert "prompt 10 + max_tokens 300 = 310 tokens; the model's context holds 256" in str(error)
    assert it.loop.controller.snapshot().counts.rejected == 1


def test_a_full_queue_says_when_to_come_back():
    async def run():
        core = {"admission": AdmissionOptions(queue_limit=1)}
        async with rig(max_batch=1, core=core) as it:
            await it.up()
            return await asyncio.gather(*(outcome(it.ask(tokens=20)) for _ in range(4)))

    assert sorted(virtually(run())) == ["queue_full", "queue_full", "served", "served"]


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_that_dies_takes_what_runs_and_serves_what_waits_when_it_is_back(mode):
    async def run():
        async with rig(max_batch=2, **MODES[mode]) as it:
            await it.up()
            asks = [asyncio.ensure_future(outcome(it.ask(tokens=20, stream=n != 1))) for n in range(4)]
            await asyncio.sleep(0.1)
            await it.backend.engine.kill()
            return await asyncio.gather(*asks), it

    ends, it = virtually(run())
    assert ends[2:] == ["served", "served"]
    assert set(ends[:2]) <= {"engine_lost", "engine"}
    assert len(it.seen.events(EngineReady)) == 2
    assert it.loop.controller.snapshot().counts.finished == 2


def test_what_waits_for_an_engine_that_is_down_is_served_when_it_comes():
    async def run():
        async with rig() as it:
            it.backend.engine.gone = True
            asks = [asyncio.ensure_future(outcome(it.ask())) for _ in range(3)]
            return await asyncio.gather(*asks)

    # Nothing is known of the engine yet: there is no place to wait in.
    assert virtually(run()) == ["no_engine"] * 3


def test_an_engine_that_fails_a_request_is_looked_at_and_the_promise_counts_as_broken():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            before = it.backend.engine.looks
            with pytest.raises(EngineError):
                async with it.models.session(
                    asked(), await it.backend.engine.count(asked()), Slo(e2e_s=9.0), "", streams=True
                ) as ticket:
                    await ticket.placed()
                    raise EngineError("it broke off")
            await asyncio.sleep(0.01)
            return it.backend.engine.looks - before, it.loop.slo_attainment.ever, it.backend.state

    looked, ever, state = virtually(run())
    assert looked == 1
    assert (ever.with_slo, ever.met, ever.e2e_violated) == (1, 0, 1)
    assert state == "up"


def test_an_engine_that_refuses_a_request_itself_is_not_doubted_and_the_place_is_free_at_once():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            before = it.backend.engine.looks
            async with it.models.session(
                asked(), await it.backend.engine.count(asked()), Slo(e2e_s=9.0), "", streams=True
            ) as ticket:
                await ticket.placed()
            cancelled = len(it.seen.events(Cancelled))
            await asyncio.sleep(1.0)
            return it.backend.engine.looks - before, cancelled

    assert virtually(run()) == (0, 1)


def test_a_client_that_leaves_breaks_no_promise():
    async def run():
        async with rig() as it:
            await it.up()
            assert await it.ask(tokens=9, hang_up_after=3, slo=Slo(e2e_s=9.0)) is None
            await asyncio.sleep(0.01)
            return it.loop.slo_attainment.ever, len(it.seen.events(Cancelled))

    ever, cancelled = virtually(run())
    assert (ever.with_slo, cancelled) == (0, 1)


def test_stopping_ends_what_waits_and_what_runs():
    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            asks = [asyncio.ensure_future(outcome(it.ask(tokens=200))) for _ in range(3)]
            await asyncio.sleep(0.2)
            await it.models.stop()
            return await asyncio.gather(*asks), it.seen.ends

    ends, seen = virtually(run())
    assert ends == ["draining"] * 3
    assert len(seen) == 3


def test_ending_one_may_end_another_and_neither_twice():
    """The sweep goes over those that were open when it began."""

    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            asks = [asyncio.ensure_future(outcome(it.ask(tokens=50))) for _ in range(3)]
            await asyncio.sleep(0.05)
            for visit in it.loop.open():
                for _ in range(2):
                    it.loop.fail(visit, RejectedError(503, "x", kind="k", code="tried"))
            return await asyncio.gather(*asks)

    assert virtually(run()) == ["tried"] * 3


def test_a_promise_that_cannot_be_kept_is_refused_where_that_is_wanted():
    async def run():
        async with rig(core={"admission": AdmissionOptions(unmeetable="reject")}) as it:
            await it.up()
            ends = [await outcome(it.ask(tokens=50, slo=Slo(e2e_s=0.05)))]
            return ends, it.loop.slo_attainment.ever, it.seen.commands(Reject)

    ends, ever, rejects = virtually(run())
    assert ends == ["slo_unmeetable"]
    assert (ever.with_slo, ever.met) == (1, 0)
    assert len(rejects) == 1


def test_a_kill_while_everybody_leaves_is_no_trouble():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            asks = [asyncio.ensure_future(outcome(it.ask(tokens=90))) for _ in range(4)]
            await asyncio.sleep(0.2)
            for task in asks:
                task.cancel()
            await it.backend.engine.kill()
            for task in asks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await asyncio.sleep(0.01)
            await it.up()
            return await outcome(it.ask())

    assert virtually(run()) == "served"
