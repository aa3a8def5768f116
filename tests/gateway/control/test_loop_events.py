"""Events on their way into the core: one after the other in their order, a timer that is never early, and clocks that
are planned after the requests of a round are on their way. The observer gets every call.
"""

import asyncio

import pytest

from gateway.rig import rig, virtually
from throttllem.config import LimitOptions
from throttllem.core.types import (
    Arrived,
    Cancelled,
    Dispatch,
    EngineLost,
    Fail,
    Observed,
    Progressed,
    Reason,
    Reject,
    Request,
    SetClock,
    Slo,
    StartEngine,
    Stepped,
    Timer,
)
from throttllem.gateway.control import loop as loop_module
from throttllem.gateway.control.loop import ControlLoop


class Script:
    """A core that does as it is scripted: `react(event)` is called with each event and returns its commands."""

    def __init__(self, react=lambda event: []):
        self.seen, self.react, self.deadline_s = [], react, None

    def handle(self, event, now_s):
        self.seen.append((event, now_s))
        return self.react(event) or []

    def next_deadline(self):
        return self.deadline_s

    def serving(self):
        return None


class Calls:
    """An observer that keeps the calls as they are handed over."""

    def __init__(self):
        self.batches = []

    def handled(self, calls):
        self.batches.append(list(calls))

    def ended(self, session, met):
        raise AssertionError("no request was opened")


def scripted(react=lambda event: [], *, now=None):
    """A control loop without backends around a scripted core. For a running event loop."""
    core, observer = Script(react), Calls()
    loop = ControlLoop(
        controller=core,
        backends=(),
        limits=LimitOptions(),
        now=now or asyncio.get_running_loop().time,
        observer=observer,
    )
    return loop, core, observer


def step(iteration):
    return Stepped(engine=0, iteration=iteration)


# ---- order ---------------------------------------------------------------------------------------------------


def test_an_event_that_comes_up_while_another_is_handled_waits_its_turn():
    async def run():
        depth = 0

        def react(event):
            nonlocal depth
            depth += 1
            assert depth == 1
            if event == step(0):
                loop.handle(Cancelled(request_id=1))
                loop.handle(step(1))
                assert len(core.seen) == 1
            depth -= 1

        loop, core, _ = scripted(react)
        loop.handle(step(0))
        return [event for event, _ in core.seen]

    assert virtually(run()) == [step(0), Cancelled(request_id=1), step(1)]


def test_an_event_that_comes_up_while_a_command_is_carried_out_waits_for_the_other_commands():
    async def run():
        order = []

        def react(event):
            order.append(event)
            return [Reject(request_id=n, why=Reason.BATCH) for n in (1, 2)] if event == step(0) else []

        loop, _, _ = scripted(react)

        def carry_out(command, now_s):
            order.append(command.request_id)
            loop.handle(Cancelled(request_id=command.request_id))

        loop._carry_out = carry_out
        loop.handle(step(0))
        return order

    assert virtually(run()) == [step(0), 1, 2, Cancelled(request_id=1), Cancelled(request_id=2)]


def test_every_event_has_the_time_at_which_it_came_up():
    async def run():
        now_s = 0.0

        def react(event):
            nonlocal now_s
            if event == step(0):
                now_s = 2.0
                loop.handle(step(1))
                now_s = 3.0

        loop, core, _ = scripted(react, now=lambda: now_s)
        now_s = 1.0
        loop.handle(step(0))
        return core.seen

    assert virtually(run()) == [(step(0), 1.0), (step(1), 2.0)]


def test_an_event_at_which_the_core_fails_does_not_take_the_next_with_it(caplog):
    async def run():
        def react(event):
            if event == step(0):
                loop.handle(step(1))
                raise ZeroDivisionError("a fault of the core")

        loop, core, observer = scripted(react)
        loop.handle(step(0))
        loop.handle(step(2))
        loop.flush()
        return [event for event, _ in core.seen], [call.commands for call in observer.batches[0]]

    assert virtually(run()) == ([step(0), step(1), step(2)], [None, [], []])


# ---- the timer -----------------------------------------------------------------------------------------------


def test_the_timer_fires_once_at_the_deadline_last_set():
    async def run():
        loop, core, _ = scripted()
        core.react = lambda event: setattr(core, "deadline_s", None) if event == Timer() else None
        for core.deadline_s in (1.0, 3.0, 2.0, 2.0):
            loop.handle(step(0))
        await asyncio.sleep(10.0)
        core.deadline_s = 11.0
        loop.handle(step(0))
        core.deadline_s = None
        loop.handle(step(0))
        core.deadline_s = 12.0
        loop.handle(step(0))
        await loop.stop()
        await asyncio.sleep(10.0)
        return [at_s for event, at_s in core.seen if event == Timer()]

    assert virtually(run()) == [2.0]


def test_after_a_stop_no_event_arms_the_timer():
    async def run():
        loop, core, _ = scripted()
        await loop.stop()
        core.deadline_s = 1.0
        loop.handle(step(0))
        await asyncio.sleep(5.0)
        return [event for event, _ in core.seen]

    assert virtually(run()) == [step(0)]


def test_the_timer_is_never_early_whatever_the_event_loops_clock_is():
    async def run():
        clock = asyncio.get_running_loop().time
        loop, core, _ = scripted(now=lambda: clock() - 0.0025)
        core.react = lambda event: setattr(core, "deadline_s", None) if event == Timer() else None
        core.deadline_s = 1.0
        loop.handle(step(0))
        await asyncio.sleep(2.0)
        return [at_s for event, at_s in core.seen if event == Timer()]

    (at_s,) = virtually(run())
    assert 1.0 <= at_s < 1.01


def test_a_deadline_that_has_come_is_handled_in_the_next_round_and_events_of_one_round_share_it():
    async def run():
        loop, core, _ = scripted()
        core.react = lambda event: setattr(core, "deadline_s", None if event == Timer() else 0.0)
        for number in range(3):
            loop.handle(step(number))
        at_once = [event for event, _ in core.seen]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return at_once, [event for event, _ in core.seen][3:]

    assert virtually(run()) == ([step(0), step(1), step(2)], [Timer()])


# ---- what goes first -----------------------------------------------------------------------------------------


def test_a_dispatched_request_is_on_its_way_before_clocks_are_planned():
    """Its task runs between the dispatch and the plan of the clock that follows from it."""

    async def run():
        async with rig() as it:
            await it.up()
            await asyncio.sleep(1.0)
            async with it.session() as session:
                await session.placed()
                before = [type(event) for event in it.seen.events((Arrived, Timer))]
                await asyncio.sleep(0.01)
                after = [type(event) for event in it.seen.events((Arrived, Timer))]
                clocks = it.seen.commands(SetClock)
            return before[-1], after[len(before) :], len(clocks)

    arrived, after, clocks = virtually(run())
    assert arrived is Arrived
    assert after[0] is Timer
    assert clocks >= 1


def test_requests_that_arrive_together_share_one_plan():
    async def run():
        async with rig() as it:
            await it.up()
            await asyncio.sleep(1.0)
            before = len(it.seen.calls)
            sessions = [it.session() for _ in range(5)]
            for session in sessions:
                await session.__aenter__()
            await asyncio.sleep(0.0)
            await asyncio.sleep(0.0)
            found = [type(event) for _, event, _ in it.seen.calls[before:]]
            for session in sessions:
                await session.__aexit__(None, None, None)
            return found

    assert virtually(run()) == [Arrived] * 5 + [Timer]


# ---- the requests of an event --------------------------------------------------------------------------------

REQUEST = Request(id=7, arrival_s=0.0, prompt_tokens=1, max_tokens=1, slo=Slo())


@pytest.mark.parametrize(
    ("what", "requests"),
    [
        (Arrived(request=REQUEST), (7,)),
        (Cancelled(request_id=7), (7,)),
        (Progressed(engine=0, request_id=7, tokens=1), (7,)),
        (Dispatch(engine=0, request_id=7), (7,)),
        (Reject(request_id=7, why=Reason.BATCH), (7,)),
        (Fail(request_id=7, why=Reason.ENGINE_LOST), (7,)),
        (Stepped(engine=0, iteration=1, started=(1, 2), preempted=(3,), finished=(4,)), (1, 2, 3)),
        (Observed(engine=0, running=1, waiting=0), ()),
        (Timer(), ()),
        (EngineLost(engine=0), ()),
        (StartEngine(engine=0, tp=1), ()),
    ],
)
def test_requests_that_cannot_go_on_without_an_event_or_a_command(what, requests):
    async def run():
        return scripted()[0]._affected(what)

    assert virtually(run()) == requests


# ---- the observer --------------------------------------------------------------------------------------------


def test_the_observer_gets_every_call_in_order_once():
    async def run():
        reject = Reject(request_id=1, why=Reason.BATCH)
        loop, _, observer = scripted(lambda event: [reject] if event == step(1) else [])
        for number in range(3):
            loop.handle(step(number))
        assert observer.batches == []
        loop.flush()
        loop.flush()
        loop.handle(step(3))
        await loop.stop()
        return reject, observer.batches

    reject, batches = virtually(run())
    assert [[(call.event, call.commands) for call in batch] for batch in batches] == [
        [(step(0), []), (step(1), [reject]), (step(2), [])],
        [(step(3), [])],
    ]
    assert all(call.seconds >= 0.0 for batch in batches for call in batch)


def test_no_more_than_some_calls_are_held():
    async def run():
        loop, _, observer = scripted()
        for number in range(3 * loop_module._HELD_RECORDS):
            loop.handle(step(number))
        held = len(loop._calls)
        loop.flush()
        return [call.event.iteration for batch in observer.batches for call in batch], held

    found, held = virtually(run())
    assert found == list(range(3 * loop_module._HELD_RECORDS))
    assert held <= loop_module._HELD_RECORDS
