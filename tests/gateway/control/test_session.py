"""One request from its arrival to its end: what its task sees of rejections, interruptions and cancellations, in every
order.
"""

import asyncio
import contextlib
from dataclasses import asdict

import pytest

from gateway.rig import parsed, rig, virtually
from throttllem.core.types import Slo
from throttllem.engines.base import EngineError, PromptCount
from throttllem.engines.prefix_cache import blocks_of
from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.usage import NO_USAGE, Usage

GONE = ApiError(502, "gone", kind="engine_error", code="test")


async def hold(it, *, raised=None):
    """Hold a session until something happens; `raised`: what its task raises in place of an interruption."""
    async with it.session() as session:
        await session.placed()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if raised is None:
                raise
            raise raised from None


async def interrupted(order, **how):
    """How a session ends after `order`: letters of (l)oop and (c)lient, that end it."""
    async with rig() as it:
        await it.up()
        task = asyncio.ensure_future(hold(it, **how))
        await asyncio.sleep(0.05)
        (session,) = it.loop.open()
        for letter in order:
            if letter == "l":
                it.loop.fail(session, GONE)
            else:
                task.cancel()
        (found,) = await asyncio.gather(task, return_exceptions=True)
        return found, task.cancelling(), it.seen.ends


# ---- what the engine counted ---------------------------------------------------------------------------------------


async def served(it, blocks=(), *, events=1, usage=NO_USAGE, **more):
    """The receipt of a request whose tokens came in that many events, and its request."""
    count = PromptCount(tokens=40, by="test", exact=True, blocks=blocks)
    async with it.models.session(parsed(tokens=30, **more), count, Slo()) as session:
        await session.placed()
        for _ in range(events):
            await asyncio.sleep(0.3)
            session.tokens()
        return session.finish(usage.output_tokens, usage), session


def test_the_engines_total_corrects_tokens_latency_and_totals():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            usage = Usage(output_tokens=30, prompt_tokens=44, cached_tokens=32)
            counted, session = await served(it, events=10, usage=usage)
            guessed, _ = await served(it, events=10)
            lied = await served(it, usage=Usage(output_tokens=1, prompt_tokens=10**6, cached_tokens=9 * 10**5))
            totals = it.loop.prompt_tokens, it.loop.cached_prompt_tokens, it.loop.generated_tokens
            return counted, guessed, lied[0], session, totals, it.loop.estimated_outputs

    counted, guessed, lied, session, totals, estimated = virtually(run())
    assert (counted.output_tokens, counted.output_tokens_estimated, counted.cached_prompt_tokens) == (30, None, 32)
    assert (guessed.output_tokens, guessed.output_tokens_estimated) == (10, True)
    assert counted.mean_itl_ms == pytest.approx(2700 / 29, rel=1e-3) and guessed.mean_itl_ms == pytest.approx(300)
    assert session.generated_tokens == 30
    assert lied.cached_prompt_tokens is None
    assert totals == (44 + 40 + 40, 32, 41) and estimated == 1


def test_cached_prompt_tokens_are_neither_computed_nor_charged():
    async def run():
        async with rig(mute=True, prefix_caching=True, block_tokens=4) as it:
            await it.up()
            blocks, flights = blocks_of(range(40), 4, "toy"), []
            for more in ({}, {"choices": 3}):
                task = asyncio.ensure_future(served(it, blocks, **more))
                await asyncio.sleep(0.1)
                flights += [flight.prompt_tokens for flight in it.backend.progress.in_flight.values()]
                await task
            await it.backend._take_into_use(it.backend.key, it.backend.connected, lambda event: None)
            return flights, it.models.session(parsed(), PromptCount(tokens=40, by="", exact=True, blocks=blocks), Slo())

    flights, after_a_restart = virtually(run())
    assert flights == [40, 4 * 3]
    assert after_a_restart.request.cached_prompt_tokens == 0


def test_tokens_of_pictures_are_learned_from_what_the_engine_reports():
    """Of a text of 40 tokens with two pictures the engine reports 1,640 in all: 800 a picture."""

    async def run():
        async with rig(mute=True, kv_blocks=600, max_context_tokens=2400, tables=False) as it:
            await it.up()
            pictures, seen = PromptCount(tokens=40, by="test", exact=False, parts=2), []
            for _ in range(20):
                async with it.models.session(parsed(), pictures, Slo()) as session:
                    await session.placed()
                    seen.append(session.request.prompt_tokens)
                    session.finish(8, Usage(output_tokens=8, prompt_tokens=1640))
            return seen

    first, *_, last = virtually(run())
    assert first == 40 + 2 * 256 and last == pytest.approx(1640, rel=0.01)


# ---- its end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["l", "ll"])
def test_an_interruption_by_the_control_loop_raises_its_failure(order):
    found, cancelling, ends = virtually(interrupted(order))
    assert found is GONE
    assert cancelling == 0
    assert len(ends) == 1


@pytest.mark.parametrize("order", ["c", "lc", "cl", "clc", "lcl"])
def test_a_cancellation_by_the_client_stays_a_cancellation(order):
    found, cancelling, ends = virtually(interrupted(order))
    assert isinstance(found, asyncio.CancelledError)
    assert cancelling == order.count("c")
    assert len(ends) == 1


def test_an_error_of_the_engine_that_follows_from_the_interruption_does_not_replace_the_failure():
    found, cancelling, _ = virtually(interrupted("l", raised=EngineError("the reply broke off")))
    assert found is GONE
    assert cancelling == 0


def test_an_error_of_the_program_is_not_hidden():
    found, cancelling, _ = virtually(interrupted("l", raised=ZeroDivisionError("oh")))
    assert isinstance(found, ZeroDivisionError)
    assert cancelling == 0


def test_an_earlier_cancellation_of_the_task_does_not_hide_the_failure():
    async def run():
        async with rig() as it:
            await it.up()

            async def twice():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)
                with pytest.raises(ApiError):
                    await hold(it)
                return asyncio.current_task().cancelling()

            task = asyncio.ensure_future(twice())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0.05)
            (session,) = it.loop.open()
            it.loop.fail(session, GONE)
            return await task

    assert virtually(run()) == 1


@pytest.mark.parametrize("client", [False, True])
def test_a_rejection_while_it_waits_for_a_place(client):
    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            first = asyncio.ensure_future(hold(it))
            waits = asyncio.ensure_future(hold(it))
            await asyncio.sleep(0.05)
            session = it.loop.open()[1]
            assert session.dispatched_s is None
            it.loop.fail(session, GONE)
            if client:
                waits.cancel()
            (found,) = await asyncio.gather(waits, return_exceptions=True)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            return found, waits.cancelling(), session.failure

    found, cancelling, failure = virtually(run())
    assert failure is GONE
    assert isinstance(found, asyncio.CancelledError) if client else found is GONE
    assert cancelling == client


def test_a_place_that_is_found_while_the_client_disconnects_is_freed():
    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            first, second = asyncio.ensure_future(hold(it)), asyncio.ensure_future(hold(it))
            await asyncio.sleep(0.05)
            second.cancel()
            first.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
            (view,) = it.loop.controller.snapshot().engines
            return view.running + view.pending, await it.request() is not None

    assert virtually(run()) == (0, True)


def test_a_finished_session_stays_finished():
    async def run():
        async with rig() as it:
            await it.up()
            async with it.session(tokens=4) as session:
                await session.placed()
                session.tokens(3)
                first = session.finish(4)
                it.loop.fail(session, GONE)
                session.tokens(9)
                assert session.finish(5) == first
            assert session.failure is None
            return session, it.seen.ends

    session, ends = virtually(run())
    assert session.generated_tokens == 4
    assert len(ends) == 1


def test_a_failed_session_does_not_finish():
    async def run():
        async with rig() as it:
            await it.up()
            with pytest.raises(ApiError):
                async with it.session() as session:
                    await session.placed()
                    session.tokens(1)
                    it.loop.fail(session, GONE)
                    session.tokens(1)
                    session.finish(2)
                    await asyncio.sleep(1)
            return session.generated_tokens, it.loop.controller.snapshot().counts, it.seen.ends

    tokens, counts, ends = virtually(run())
    assert tokens == 1
    assert (counts.finished, counts.failed) == (0, 1)
    assert len(ends) == 1


def test_a_session_that_is_left_without_waiting_for_a_place_is_cancelled():
    async def run():
        async with rig() as it:
            await it.up()
            async with it.session() as session:
                pass
            with pytest.raises(KeyError):
                async with it.session():
                    raise KeyError("of the caller")
            await asyncio.sleep(0.01)
            (view,) = it.loop.controller.snapshot().engines
            return session.ended, len(it.seen.ends), view.pending

    assert virtually(run()) == (True, 2, 0)


def test_a_rejection_that_no_task_waits_for_is_no_error():
    async def run():
        async with rig() as it:
            await it.up()
            async with it.session(tokens=900) as session:
                assert session.failure.code == "context_length_exceeded"
            return len(it.seen.ends)

    assert virtually(run()) == 1


def test_a_session_is_placed_in_the_backend_that_serves():
    async def run():
        async with rig() as it:
            await it.up()
            async with it.session() as session:
                assert await session.placed() is session.backend is it.backend
                assert it.backend.in_flight == 1
            return it.backend.in_flight

    assert virtually(run()) == 0


def test_the_receipt_and_the_latencies():
    async def run():
        async with rig() as it:
            await it.up()
            began_s = it.loop.now()
            receipts = [await it.request(tokens=11), await it.request(tokens=11, stream=False)]
            receipts.append(await it.request(tokens=1))
            seen = [session.latencies() for session, _ in it.seen.ends]
            return receipts, seen, it.loop.now() - began_s

    (first, second, third), (streamed, whole, single), spent_s = virtually(run())
    assert first.queue_time_ms == 0.0
    assert first.time_to_first_token_ms == pytest.approx(streamed.ttft_s * 1e3, abs=0.001)
    assert first.mean_itl_ms == pytest.approx((streamed.e2e_s - streamed.ttft_s) * 100, abs=0.001)
    assert (second.time_to_first_token_ms, second.mean_itl_ms, whole.ttft_s) == (None, None, None)
    assert (third.mean_itl_ms, single.tbt_s) == (None, None)
    assert single.ttft_s == single.e2e_s
    assert streamed.e2e_s + whole.e2e_s + single.e2e_s == pytest.approx(spent_s)
    assert all(receipt.energy_joules > 0 for receipt in (first, second, third))
    assert {receipt.clock_mhz for receipt in (first, second, third)} <= {600, 1400}


def test_a_session_that_was_never_placed_has_no_energy():
    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            first = asyncio.ensure_future(hold(it))
            await asyncio.sleep(0.05)
            async with it.session() as session:
                await asyncio.sleep(0.05)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            return session.energy_j, session.receipt()

    energy_j, receipt = virtually(run())
    assert energy_j is None
    assert set(asdict(receipt).values()) == {None}


def test_the_core_counts_a_request_under_the_name_of_its_slo_class():
    async def run():
        async with rig() as it:
            await it.up()
            await it.request(slo=Slo(e2e_s=60.0, attainment=0.9), slo_class="batch")
            await it.request(slo=Slo())
            return it.loop.controller.snapshot().attainment

    (only,) = virtually(run())
    assert (only.name, only.asked, only.had, only.ended) == ("batch", 0.9, 1.0, 1), "one without an SLO is not judged"
