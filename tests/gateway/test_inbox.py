"""Events reach the core in their order, those of one iteration as one, and none within another."""

import asyncio

import pytest
from throttllem.gateway.control.inbox import EventQueue

from throttllem.core.types import Cancelled, Observed, Stepped, Timer


class Desk:
    """An inbox that writes down what it hands in; `react` is called with each event."""

    def __init__(self, react=lambda event: None):
        self.seen, self.settled, self.clock_s, self.react = [], 0, 0.0, react
        self.inbox = EventQueue(self.handle, self.settle, lambda: self.clock_s)

    def handle(self, event, now_s):
        self.seen.append((event, now_s))
        self.react(event)

    def settle(self):
        self.settled += 1


def step(iteration, *, engine=0, **named):
    return Stepped(engine=engine, iteration=iteration, **named)


def noted(*events):
    """What is handed in of events that were noted one after the other, and how often it settled."""

    async def run():
        desk = Desk()
        for desk.clock_s, event in enumerate(events):
            desk.inbox.note(event)
        assert desk.seen == []
        await asyncio.sleep(0)
        return desk.seen, desk.settled

    return asyncio.run(run())


def test_one_iteration_is_one_event():
    seen, settled = noted(step(3, started=(1,)), step(3, started=(2,)), step(3, finished=(1,)), step(4))
    assert seen == [(step(3, started=(1, 2), finished=(1,)), 0), (step(4), 3)]
    assert settled == 1


@pytest.mark.parametrize(
    "other", [step(4, started=(2,)), step(3, engine=1, started=(2,)), step(3, preempted=(1,)), Timer()]
)
def test_others_stay_apart(other):
    assert [event for event, _ in noted(step(3, started=(1,)), other)[0]] == [step(3, started=(1,)), other]


def test_what_is_told_goes_in_at_once_behind_what_waits():
    async def run():
        desk = Desk()
        said = Observed(engine=0, running=1, waiting=0)
        desk.inbox.note(said)
        desk.inbox.tell(Timer())
        assert [event for event, _ in desk.seen] == [said, Timer()]
        await asyncio.sleep(0)
        return len(desk.seen), desk.settled

    assert asyncio.run(run()) == (2, 1)


def test_an_event_that_arises_within_another_comes_after_it():
    async def run():
        depth = 0

        def react(event):
            nonlocal depth
            depth += 1
            assert depth == 1
            if event == Timer():
                desk.inbox.tell(Cancelled(request_id=1))
                desk.inbox.note(step(0))
            depth -= 1

        desk = Desk(react)
        desk.inbox.tell(Timer())
        return [event for event, _ in desk.seen]

    assert asyncio.run(run()) == [Timer(), Cancelled(request_id=1), step(0)]


def test_one_that_fails_does_not_take_the_others_with_it():
    async def run():
        def react(event):
            if event == step(0):
                raise ZeroDivisionError

        desk = Desk(react)
        desk.inbox.note(step(0))
        desk.inbox.note(step(1))
        with pytest.raises(ZeroDivisionError):
            desk.inbox.drain()
        await asyncio.sleep(0)
        return [event for event, _ in desk.seen]

    assert asyncio.run(run()) == [step(0), step(1)]
