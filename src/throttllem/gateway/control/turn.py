"""One event through the core in two halves: who comes in, then what the clocks should be.

Between the two a request that was let in is sent to its engine, which need not wait for the plan. To the core, and to
the flight recorder, it is one call of `handle`: no other event goes in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, Protocol

from throttllem.core.controller import Controller
from throttllem.core.types import Command, Event, Timer

if TYPE_CHECKING:
    from throttllem.gateway.control.session import Session

log = logging.getLogger("throttllem.gateway")


class Observer(Protocol):
    """Whoever keeps what happened: the flight recorder and the histograms of metrics."""

    def handled(self, now_s: float, event: Event, commands: list[Command] | None, seconds: float) -> None:
        """The core took `event` in, in `seconds`, and answered with `commands` (None: it raised)."""

    def ended(self, visit: Session, kept: bool | None) -> None:
        """A request ended; `kept`: all its promises, None if it had none or its client left."""


class _Open(NamedTuple):
    event: Event
    now_s: float
    commands: list[Command]
    seconds: float


class Turn:
    """`do` carries commands out, `give_up` ends the requests of an event at which the core failed."""

    def __init__(
        self,
        controller: Controller,
        do: Callable[[list[Command]], None],
        give_up: Callable[[Event], None],
        witness: Observer,
    ) -> None:
        self._controller = controller
        self._do = do
        self._give_up = give_up
        self._witness = witness
        self._open: _Open | None = None
        self.at_s = 0.0
        """When the event came that is being dealt with."""

    @property
    def open(self) -> bool:
        """Whether the second half is still to come."""
        return self._open is not None

    def begin(self, event: Event, now_s: float) -> list[Command]:
        """The first half; what to do at once. `end` must follow before the next event."""
        self.at_s = now_s
        before = perf_counter()
        try:
            commands = self._controller.handle(event, now_s)
        except Exception:
            self._failed(event, now_s, perf_counter() - before)
            return []
        self._open = _Open(event, now_s, commands, perf_counter() - before)
        return commands

    def end(self) -> None:
        """The second half, if there is one to come."""
        taken, self._open = self._open, None
        if taken is None:
            return
        self._witness.handled(taken.now_s, taken.event, taken.commands, taken.seconds)
        deadline_s = self._controller.next_deadline()
        if deadline_s is None or deadline_s > taken.now_s:
            return
        before = perf_counter()
        try:
            more = self._controller.handle(Timer(), taken.now_s)
        except Exception:
            self._failed(Timer(), taken.now_s, perf_counter() - before)
            return
        self._do(more)
        self._witness.handled(taken.now_s, Timer(), more, perf_counter() - before)

    def _failed(self, event: Event, now_s: float, seconds: float) -> None:
        log.exception("the control core failed at %s", type(event).__name__)
        self._witness.handled(now_s, event, None, seconds)
        self._give_up(event)
