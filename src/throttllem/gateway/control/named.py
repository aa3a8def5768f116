"""Whose requests an event or a command is about: they end when it could not be carried out."""

from __future__ import annotations

from collections.abc import Mapping

from throttllem.core.types import (
    Arrived,
    Cancel,
    Cancelled,
    Command,
    Dispatch,
    EngineLost,
    Event,
    Fail,
    Progressed,
    Reject,
    Stepped,
)
from throttllem.gateway.control.session import Session


def affected(what: Event | Command, visits: Mapping[int, Session]) -> list[Session]:
    """Those of the open requests that end when it could not be carried out."""
    lost = visits.values() if isinstance(what, EngineLost) else ()
    ids = {*named(what), *(visit.request.id for visit in lost if visit.link and visit.link.key is None)}
    return [visits[request_id] for request_id in ids if request_id in visits]


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
