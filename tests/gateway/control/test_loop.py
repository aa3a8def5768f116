"""The control loop: every request ends exactly once whatever happens, and every joule is a request's or idle."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.rig import outcome, rig, virtually
from throttllem.config import LimitOptions
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.options import AdmissionOptions
from throttllem.core.types import Cancelled, EngineReady, Reject, Slo
from throttllem.engines.base import EngineError
from throttllem.gateway.telemetry.status import gateway_status
from throttllem.openai_api.errors import ApiError

SHORT = LimitOptions(queue_wait_s=2.0, engine_wait_s=1.0, silence_s=1.0)


# ---- anything may happen -------------------------------------------------------------------------------------

MODES = {"named": {}, "streams": {"mute": True}, "steps": {"numbered": True}}
"""What the engine reports of its steps: the requests in them, nothing, their numbers."""
REQUEST = st.fixed_dictionaries(
    {
        "after_s": st.floats(0.0, 0.6),
        "tokens": st.integers(1, 30),
        "stream": st.booleans(),
        "choices": st.integers(1, 3),
        "count": st.integers(1, 40),
        "slo": st.sampled_from([Slo(), Slo(e2e_s=0.3), Slo(e2e_s=5.0, tbt_s=0.1), Slo(ttft_s=0.2)]),
        "usage": st.booleans(),
        "disconnect_after": st.none() | st.integers(1, 20),
        "cancel_after_s": st.none() | st.floats(0.0, 0.8),
    }
)
CASE = {
    "mode": st.sampled_from(sorted(MODES)),
    "policy": st.sampled_from([ClockPolicy.LEAST_ENERGY, ClockPolicy.THROTTLLEM, ClockPolicy.TOP]),
    "rejects": st.booleans(),
    "queue": st.sampled_from([2, 100]),
    "blocks": st.sampled_from([25, 200]),
    "requests": st.lists(REQUEST, min_size=1, max_size=12),
    "kills_s": st.lists(st.tuples(st.floats(0.0, 0.5), st.floats(0.0, 1.5)), max_size=2),
}


async def one(it, after_s, cancel_after_s, **more):
    await asyncio.sleep(after_s)
    task = asyncio.ensure_future(outcome(it.request(**more)))
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


async def anything(mode, policy, rejects, queue, blocks, requests, kills_s):
    core = {"admission": AdmissionOptions(unmeetable="reject" if rejects else "serve", queue_limit=queue)}
    async with rig(policy=policy, limits=SHORT, core=core, kv_blocks=blocks, **MODES[mode]) as it:
        await it.up()
        killing = asyncio.ensure_future(kills(it, kills_s))
        ends = await asyncio.gather(*(one(it, **request) for request in requests))
        await killing
        gateway_status(it.models)
        assert not it.loop.open()
        assert it.loop.controller.snapshot().queue == 0
        if it.backend.state == "up":
            await asyncio.sleep(1.0)  # the engine has reported everything by now
            (view,) = it.loop.controller.snapshot().engines
            assert (view.running, view.pending, it.backend.in_flight) == (0, 0, 0)
        return ends, it.seen.ends


@settings(max_examples=25, deadline=None)
@given(**CASE)
def test_every_request_ends_once_and_every_joule_is_a_requests_or_idle(**case):
    ends, seen = virtually(anything(**case))
    assert set(ends) <= {
        *("served", "disconnected", "cancelled", "engine", "engine_lost", "queue_full", "slo_unmeetable"),
        *("no_engine", "queue_timeout", "engine_silent", "too_many_sequences", "context_length_exceeded"),
    }
    # A task that was cancelled before its first step never opened a session.
    assert len(ends) - ends.count("cancelled") <= len(seen) <= len(ends)
    for session, met in seen:
        assert session.ended
        assert met is None or session.request.slo != Slo()
        assert session.energy_j is None or session.energy_j >= 0.0


# ---- ends ----------------------------------------------------------------------------------------------------


def test_a_request_that_never_fits_is_rejected_at_once():
    async def run():
        async with rig() as it:
            await it.up()
            with pytest.raises(ApiError) as rejected:
                await it.request(count=10, tokens=300)
            return rejected.value, it

    error, it = virtually(run())
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert "prompt 10 + max_tokens 300 = 310 tokens; the model's context holds 256" in str(error)
    assert it.loop.controller.snapshot().counts.rejected == 1


def test_a_full_queue_rejects():
    async def run():
        core = {"admission": AdmissionOptions(queue_limit=1)}
        async with rig(max_batch=1, core=core) as it:
            await it.up()
            return await asyncio.gather(*(outcome(it.request(tokens=20)) for _ in range(4)))

    assert sorted(virtually(run())) == ["queue_full", "queue_full", "served", "served"]


@pytest.mark.parametrize("mode", MODES)
def test_a_lost_engine_ends_what_runs_and_serves_what_waits_when_it_is_back(mode):
    async def run():
        async with rig(max_batch=2, **MODES[mode]) as it:
            await it.up()
            requests = [asyncio.ensure_future(outcome(it.request(tokens=20, stream=n != 1))) for n in range(4)]
            await asyncio.sleep(0.1)
            await it.backend.engine.kill()
            return await asyncio.gather(*requests), it, it.seen.events(EngineReady)

    ends, it, ready = virtually(run())
    assert ends[2:] == ["served", "served"]
    assert set(ends[:2]) <= {"engine_lost", "engine"}
    assert [event.engine for event in ready] == [0, 1]
    assert it.loop.controller.snapshot().counts.finished == 2


def test_before_an_engine_was_ever_connected_requests_are_rejected():
    """Without its spec it is not known what fits."""

    async def run():
        async with rig() as it:
            it.backend.engine.gone = True
            return await asyncio.gather(*(outcome(it.request()) for _ in range(3)))

    assert virtually(run()) == ["no_engine"] * 3


def test_an_engine_that_fails_a_request_is_checked_and_the_slo_counts_as_violated():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            before = it.backend.engine.checks
            with pytest.raises(EngineError):
                async with it.session(slo=Slo(e2e_s=9.0)) as session:
                    await session.placed()
                    raise EngineError("it broke off")
            early = len(it.seen.events(Cancelled))
            await asyncio.sleep(0.01)
            checks, freed = it.backend.engine.checks - before, len(it.seen.events(Cancelled))
            return checks, (early, freed), it.loop.slo_attainment.ever, it.backend.state

    checks, freed, ever, state = virtually(run())
    assert (checks, freed) == (1, (0, 1)), "its place is free after the check, not before"
    assert (ever.with_slo, ever.met, ever.e2e_violated) == (1, 0, 1)
    assert state == "up"


def test_an_engine_that_rejects_a_request_itself_is_not_suspected_and_the_place_is_free_at_once():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            before = it.backend.engine.checks
            async with it.session(slo=Slo(e2e_s=9.0)) as session:
                await session.placed()
            cancelled = len(it.seen.events(Cancelled))
            await asyncio.sleep(1.0)
            return it.backend.engine.checks - before, cancelled

    assert virtually(run()) == (0, 1)


def test_a_client_that_disconnects_violates_no_slo():
    async def run():
        async with rig() as it:
            await it.up()
            assert await it.request(tokens=9, disconnect_after=3, slo=Slo(e2e_s=9.0)) is None
            await asyncio.sleep(0.01)
            return it.loop.slo_attainment.ever, len(it.seen.events(Cancelled))

    ever, cancelled = virtually(run())
    assert (ever.with_slo, cancelled) == (0, 1)


def test_stopping_ends_what_waits_and_what_runs():
    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            requests = [asyncio.ensure_future(outcome(it.request(tokens=200))) for _ in range(3)]
            await asyncio.sleep(0.2)
            await it.models.stop()
            return await asyncio.gather(*requests), it.seen.ends

    ends, seen = virtually(run())
    assert ends == ["draining"] * 3
    assert len(seen) == 3


def test_a_request_that_is_failed_twice_ends_once():
    """The sweep looks at the requests that were open when it began; ending one may end another."""

    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            requests = [asyncio.ensure_future(outcome(it.request(tokens=50))) for _ in range(3)]
            await asyncio.sleep(0.05)
            for session in it.loop.open():
                for _ in range(2):
                    it.loop.fail(session, ApiError(503, "x", kind="k", code="tried"))
            return await asyncio.gather(*requests)

    assert virtually(run()) == ["tried"] * 3


def test_an_slo_that_cannot_be_met_is_rejected_where_that_is_configured():
    async def run():
        async with rig(core={"admission": AdmissionOptions(unmeetable="reject")}) as it:
            await it.up()
            ends = [await outcome(it.request(tokens=50, slo=Slo(e2e_s=0.05)))]
            return ends, it.loop.slo_attainment.ever, it.seen.commands(Reject)

    ends, ever, rejects = virtually(run())
    assert ends == ["slo_unmeetable"]
    assert (ever.with_slo, ever.met) == (1, 0)
    assert len(rejects) == 1


def test_a_kill_while_all_clients_disconnect_does_no_harm():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            requests = [asyncio.ensure_future(outcome(it.request(tokens=90))) for _ in range(4)]
            await asyncio.sleep(0.2)
            for task in requests:
                task.cancel()
            await it.backend.engine.kill()
            for task in requests:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await asyncio.sleep(0.01)
            await it.up()
            return await outcome(it.request())

    assert virtually(run()) == "served"
