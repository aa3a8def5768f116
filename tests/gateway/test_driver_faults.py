"""The core, or what it says, fails: the requests that it was about end, and everybody else goes on."""

import asyncio

import pytest

from gateway.rig import asked, outcome, rig, virtually
from throttllem.core.types import Arrived, Cancelled, Dispatch, EngineLost, Slo, Stepped, Timer
from throttllem.engines.base import PromptCount

COUNT = PromptCount(tokens=4, by="test", exact=True)


def failing(it, unmeetable):
    """The core fails at every event that `unmeetable` is true of; those events."""
    healthy, failed = it.loop.controller.take_in, []

    def take_in(event, now_s):
        if unmeetable(event):
            failed.append(event)
            raise ZeroDivisionError("a fault of the core")
        return healthy(event, now_s)

    it.loop.controller.take_in = take_in
    return failed


def test_a_request_at_whose_arrival_the_core_fails_is_told_so_and_no_other(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            other = asyncio.ensure_future(outcome(it.ask(tokens=30)))
            await asyncio.sleep(0.05)
            failing(it, lambda event: isinstance(event, Arrived))
            first = await outcome(it.ask())
            del it.loop.controller.take_in
            return first, await other, await outcome(it.ask()), it.loop.open(), it.seen.handled_

    first, other, after, still_open, handled = virtually(run())
    assert (first, other, after, still_open) == ("internal_error", "served", "served", ())
    assert "the control core failed at Arrived" in caplog.text
    assert [type(event) for _, event, commands in handled if commands is None] == [Arrived]


def test_it_fails_at_what_another_waits_for():
    """The event was handed in by one request, and was about another."""

    async def run():
        async with rig(max_batch=1) as it:
            await it.up()
            failed = failing(it, lambda event: isinstance(event, Cancelled) and not failed)
            leaves = it.models.session(asked(), COUNT, Slo(), "")
            async with leaves:
                await leaves.placed()
            assert len(failed) == 1
            return it.loop.open(), it.seen.ends

    still_open, ends = virtually(run())
    assert still_open == ()
    assert len(ends) == 1


def test_a_step_in_which_it_fails_ends_who_began_in_it_and_frees_who_finished():
    async def run():
        async with rig() as it:
            await it.up()
            failed = failing(it, lambda event: isinstance(event, Stepped) and (event.started or event.finished))
            begins = await outcome(it.ask())
            del it.loop.controller.take_in
            failed = failing(it, lambda event: isinstance(event, Stepped) and event.finished)
            ends = await outcome(it.ask())
            await asyncio.sleep(0.5)
            assert failed
            (view,) = it.loop.controller.snapshot().engines
            return begins, ends, view.running + view.pending

    assert virtually(run()) == ("internal_error", "served", 0)


def test_it_fails_when_an_engine_is_lost():
    async def run():
        async with rig() as it:
            await it.up()
            asks = [asyncio.ensure_future(outcome(it.ask(tokens=90, stream=n % 2 == 0))) for n in range(3)]
            await asyncio.sleep(0.1)
            failing(it, lambda event: isinstance(event, EngineLost))
            await it.backend.engine.kill()
            return await asyncio.wait_for(asyncio.gather(*asks), 1.0)

    assert set(virtually(run())) <= {"internal_error", "engine"}


def test_a_command_that_cannot_be_carried_out_keeps_no_other_from_it(caplog):
    async def run():
        async with rig() as it:
            await it.up()
            healthy = it.loop._do

            def broken(command):
                if isinstance(command, Dispatch) and command.request_id == 1:
                    raise ZeroDivisionError("a fault of the loop")
                healthy(command)

            it.loop._do = broken
            ends = await asyncio.gather(*(outcome(it.ask()) for _ in range(3)))
            await asyncio.sleep(0.5)
            (view,) = it.loop.controller.snapshot().engines
            return ends, view.running + view.pending

    assert virtually(run()) == (["internal_error", "served", "served"], 0)
    assert "Dispatch could not be carried out" in caplog.text


def test_what_is_due_and_fails_is_tried_again_but_not_at_once():
    async def run():
        async with rig() as it:
            await it.up()
            failed = failing(it, lambda event: isinstance(event, Timer))
            it.loop.controller.next_deadline = lambda: 0.0
            it.loop._arm()
            await asyncio.sleep(5.0)
            count = len(failed)
            del it.loop.controller.next_deadline, it.loop.controller.take_in
            return count

    assert virtually(run()) == pytest.approx(5, abs=1)
