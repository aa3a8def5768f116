"""After a failure of the core: what it knows of an engine is built again, so that service goes on without a restart.

The engine counts as lost to the core and is connected to again under a new id, with empty books.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from throttllem.core.types import (
    Arrived,
    ClockRead,
    Command,
    Dispatch,
    EngineLost,
    EngineReady,
    Event,
    Observed,
    Progressed,
    StartEngine,
    Stepped,
)
from throttllem.gateway.control.backend import Backend, Tell

log = logging.getLogger("throttllem.gateway")

AFTER_FAULT_S = 1.0
"""The core that failed is not woken at once again: what failed may still be due."""
_REQUESTS = 3
"""The core failed at so many requests in a row: the engines are at fault, not the requests."""


class Recovery:
    """`failed` hears every event and command that could not be carried out, `served` every request that was."""

    def __init__(self, links: tuple[Backend, ...], tell: Tell, now: Callable[[], float]) -> None:
        self.doubtful = False
        """The core failed, and no request that came since was served."""
        self._links = links
        self._tell = tell
        self._now = now
        self._requests = 0
        self._failed_s = -math.inf
        self._rebuilt_s: dict[str, float] = {}
        self._due: set[asyncio.Handle] = set()
        self._stopped = False

    def ensure(self) -> None:
        """Start the largest engine, under an id that no engine had, if none is up or starting."""
        if all(link.key is None for link in self._links):
            largest = max(self._links, key=lambda link: link.tp)
            largest.start(1 + max(link.last_key for link in self._links), self._tell)

    def served(self, arrival_s: float) -> None:
        """A request that arrived at this time has its whole answer."""
        if arrival_s >= self._failed_s:
            self.doubtful, self._requests = False, 0

    def failed(self, what: Event | Command) -> None:
        """It could not be carried out. A failure at an engine's event leaves the books of that engine in doubt."""
        match what:
            case Stepped() | Progressed() | Observed() | ClockRead() | EngineReady():
                suspects = [link for link in self._links if link.key == what.engine]
            case Arrived() | Dispatch():
                self._requests += 1
                suspects = [link for link in self._links if self._requests >= _REQUESTS]
            case EngineLost():
                self._later(AFTER_FAULT_S, lambda: self._tell(what))
                self._later(0, self.ensure)
                suspects = []
            case StartEngine():
                self._later(0, self.ensure)
                suspects = []
            case _:
                return
        self.doubtful, self._failed_s = True, self._now()
        for link in suspects:
            self._rebuild(link)

    def stop(self) -> None:
        """Rebuild nothing any more."""
        self._stopped = True
        for handle in self._due:
            handle.cancel()
        self._due.clear()

    def _rebuild(self, link: Backend) -> None:
        """Soon, from the loop itself: the failed event may be in the hands of the task that watches the engine."""
        due_s = max(self._now(), self._rebuilt_s.get(link.name, -math.inf) + AFTER_FAULT_S)
        key = link.key

        def rebuild() -> None:
            if key is None or link.key != key:
                return
            self._rebuilt_s[link.name], self._requests = self._now(), 0
            link.lose("the control core failed at one of its events, and begins with it from nothing")
            self.ensure()

        self._later(due_s - self._now(), rebuild)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        def run() -> None:
            self._due.discard(handle)
            work()

        if self._stopped:
            return
        loop = asyncio.get_running_loop()
        handle: asyncio.Handle = loop.call_later(seconds, run) if seconds > 0 else loop.call_soon(run)
        self._due.add(handle)
