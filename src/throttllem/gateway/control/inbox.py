"""Events on their way into the core, in the order in which they arose, each with its time.

What only tells of progress waits for the loop's next round: tokens reach their clients before the core plans, and the
rows that begin or end in one iteration are one event, with one plan. Anything else goes in at once, behind what waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from throttllem.core.types import Event, Stepped


class EventQueue:
    """`handle` is called with one event after the other, never within itself; `settled` when none is left."""

    def __init__(
        self, handle: Callable[[Event, float], None], settled: Callable[[], None], now: Callable[[], float]
    ) -> None:
        self._handle = handle
        self._settled = settled
        self._now = now
        self._events: deque[tuple[Event, float]] = deque()
        self._handling = False
        self._soon: asyncio.Handle | None = None

    def tell(self, event: Event) -> None:
        """Hand in an event, and all that wait."""
        self._events.append((event, self._now()))
        if not self._handling:
            self.drain()

    def note(self, event: Event) -> None:
        """Hand in an event soon."""
        events = self._events
        if events and isinstance(event, Stepped) and (both := _together(events[-1][0], event)):
            events[-1] = (both, events[-1][1])
            return
        events.append((event, self._now()))
        if self._soon is None and not self._handling:
            self._soon = asyncio.get_running_loop().call_soon(self.drain)

    def drain(self) -> None:
        """Hand in all that wait."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        self._handling = True
        try:
            while self._events:
                self._handle(*self._events.popleft())
        finally:
            self._handling = False
            if self._events:  # one failed; the others are none the less true
                self._soon = asyncio.get_running_loop().call_soon(self.drain)
            self._settled()


def _together(one: Event, other: Stepped) -> Stepped | None:
    """Two reports of the same iteration as one; None where they are not, or where their order matters."""
    if not isinstance(one, Stepped) or (one.engine, one.iteration) != (other.engine, other.iteration):
        return None
    if one.preempted or other.preempted:
        return None
    started, finished = one.started + other.started, one.finished + other.finished
    return Stepped(engine=one.engine, iteration=one.iteration, started=started, finished=finished)
