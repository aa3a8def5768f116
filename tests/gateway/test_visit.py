"""One request's way: what its holder sees of refusals, interruptions and cancels, in every order."""

import asyncio
import contextlib

import pytest

from gateway.rig import asked, rig, virtually
from throttllem.core.types import Slo
from throttllem.engines.base import EngineError, PromptCount
from throttllem.gateway.control.rejections import RejectedError

COUNT = PromptCount(tokens=4, by="test", exact=True)
GONE = RejectedError(502, "gone", kind="engine_error", code="test")


def ticket(it, **more):
    it_asks = asked(**more)
    return it.models.session(it_asks, COUNT, Slo(), "")


async def hold(it, *, raised=None, unheard=False):
    """Hold a ticket until something happens; `raised`: what the body makes of an interruption."""
    async with ticket(it) as held:
        await held.placed()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if raised is not None:
                raise raised from None
            if not unheard:
                raise


async def interrupted(order, **how):
    """What comes of `order`, letters of (d)river and (c)lient, that end one request."""
    async with rig() as it:
        await it.up()
        task = asyncio.ensure_future(hold(it, **how))
        await asyncio.sleep(0.05)
        (visit,) = it.loop.open()
        for who in order:
            if who == "d":
                it.loop.fail(visit, GONE)
            else:
                task.cancel()
        (found,) = await asyncio.gather(task, return_exceptions=True)
        return found, task.cancelling(), it.seen.ends


@pytest.mark.parametrize("order", ["d", "dd"])
def test_an_interruption_by_the_driver_is_its_refusal(order):
    found, cancelling, ends = virtually(interrupted(order))
    assert found is GONE
    assert cancelling == 0
    assert len(ends) == 1


@pytest.mark.parametrize("order", ["c", "dc", "cd", "cdc", "dcd"])
def test_a_cancel_by_the_client_stays_a_cancel(order):
    found, cancelling, ends = virtually(interrupted(order))
    assert isinstance(found, asyncio.CancelledError)
    assert cancelling == order.count("c")
    assert len(ends) == 1


def test_what_an_engine_makes_of_the_interruption_is_not_what_is_told():
    found, cancelling, _ = virtually(interrupted("d", raised=EngineError("the reply broke off")))
    assert found is GONE
    assert cancelling == 0


def test_an_error_of_the_program_is_not_hidden():
    found, cancelling, _ = virtually(interrupted("d", raised=ZeroDivisionError("oh")))
    assert isinstance(found, ZeroDivisionError)
    assert cancelling == 0


def test_a_task_that_was_cancelled_before_does_not_hide_the_refusal():
    async def run():
        async with rig() as it:
            await it.up()

            async def twice():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)
                with pytest.raises(RejectedError):
                    await hold(it)
                return asyncio.current_task().cancelling()

            task = asyncio.ensure_future(twice())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0.05)
            (visit,) = it.loop.open()
            it.loop.fail(visit, GONE)
            return await task

    assert virtually(run()) == 1


@pytest.mark.parametrize("client", [False, True])
def test_a_refusal_while_waiting_for_a_place(client):
    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            first = asyncio.ensure_future(hold(it))
            waits = asyncio.ensure_future(hold(it))
            await asyncio.sleep(0.05)
            visit = it.loop.open()[1]
            assert visit.dispatched_s is None
            it.loop.fail(visit, GONE)
            if client:
                waits.cancel()
            (found,) = await asyncio.gather(waits, return_exceptions=True)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            return found, waits.cancelling(), visit.failure

    found, cancelling, failure = virtually(run())
    assert failure is GONE
    assert isinstance(found, asyncio.CancelledError) if client else found is GONE
    assert cancelling == client


def test_a_place_that_is_found_while_the_client_leaves_is_given_back():
    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            first, second = asyncio.ensure_future(hold(it)), asyncio.ensure_future(hold(it))
            await asyncio.sleep(0.05)
            second.cancel()
            first.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
            (view,) = it.loop.controller.snapshot().engines
            return view.running + view.pending, await it.ask() is not None

    assert virtually(run()) == (0, True)


def test_finished_is_finished():
    async def run():
        async with rig() as it:
            await it.up()
            async with ticket(it, tokens=4) as held:
                await held.placed()
                held.tokens(3)
                first = held.finish(4)
                it.loop.fail(held, GONE)
                held.tokens(9)
                assert held.finish(5) == first
            assert held.failure is None
            return held, it.seen.ends

    held, ends = virtually(run())
    assert held.generated_tokens == 4
    assert len(ends) == 1


def test_a_failed_one_does_not_finish():
    async def run():
        async with rig() as it:
            await it.up()
            with pytest.raises(RejectedError):
                async with ticket(it) as held:
                    await held.placed()
                    held.tokens(1)
                    it.loop.fail(held, GONE)
                    held.tokens(1)
                    held.finish(2)
                    await asyncio.sleep(1)
            return held.generated_tokens, it.loop.controller.snapshot().counts, it.seen.ends

    tokens, counts, ends = virtually(run())
    assert tokens == 1
    assert (counts.finished, counts.failed) == (0, 1)
    assert len(ends) == 1


def test_a_ticket_that_is_left_without_asking_for_a_place():
    async def run():
        async with rig() as it:
            await it.up()
            async with ticket(it) as held:
                pass
            with pytest.raises(KeyError):
                async with ticket(it):
                    raise KeyError("of the caller")
            await asyncio.sleep(0.01)
            (view,) = it.loop.controller.snapshot().engines
            return held.ended, len(it.seen.ends), view.pending

    assert virtually(run()) == (True, 2, 0)


def test_a_refusal_that_nobody_asks_for_is_no_error():
    async def run():
        async with rig() as it:
            await it.up()
            async with it.models.session(asked(tokens=900), COUNT, Slo(), "") as held:
                assert held.failure.code == "context_length_exceeded"
            return len(it.seen.ends)

    assert virtually(run()) == 1


def test_what_it_was_given():
    async def run():
        async with rig() as it:
            await it.up()
            began_s = it.loop.now()
            receipts = [await it.ask(tokens=11), await it.ask(tokens=11, stream=False), await it.ask(tokens=1)]
            (streamed, _), (whole, _), (single, _) = it.seen.ends
            return receipts, streamed.seen(), whole.seen(), single.seen(), it.loop.now() - began_s

    (first, second, third), streamed, whole, single, spent_s = virtually(run())
    assert first.queue_time_ms == 0.0
    assert first.time_to_first_token_ms == pytest.approx(streamed.ttft_s * 1e3, abs=0.001)
    assert first.mean_itl_ms == pytest.approx((streamed.e2e_s - streamed.ttft_s) * 100, abs=0.001)
    assert (second.time_to_first_token_ms, second.mean_itl_ms, whole.ttft_s) == (None, None, None)
    assert (third.mean_itl_ms, single.tbt_s) == (None, None)
    assert single.ttft_s == single.e2e_s
    assert streamed.e2e_s + whole.e2e_s + single.e2e_s == pytest.approx(spent_s)
    assert all(receipt.energy_joules > 0 for receipt in (first, second, third))
