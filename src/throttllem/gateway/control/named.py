"""Whose requests an event or a command is about: they end when it could not be carried out."""

from __future__ import annotations

from throttllem.core.types import (
    Arrived,
    Cancel,
    Cancelled,
    Command,
    Dispatch,
    Event,
    Fail,
    Progressed,
    Reject,
    Stepped,
)


def named(what: Event | Command) -> tuple[int, ...]:
    """Requests that cannot go on without it."""
    match what:
        case Arrived(request=request):
            return (request.id,)
        case Stepped(started=started, preempted=preempted):
            return started + preempted
        case Progressed() | Cancelled() | Dispatch() | Reject() | Fail() | Cancel():
            return (what.request_id,)
    return ()


def done(what: Event | Command) -> tuple[int, ...]:
    """Requests that it says have their whole answer: they need it no more, but their place is free."""
    return what.finished if isinstance(what, Stepped) else ()
