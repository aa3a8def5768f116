"""The wall-clock driver of one model: events into the core as they happen, its commands carried out on real engines.

It owns the clock and the open requests; every decision is the core's. Events go through an inbox, so the core sees
one after the other and time never goes back.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from throttllem.config import LimitOptions
from throttllem.core.controller import Controller
from throttllem.core.types import (
    Arrived,
    Cancel,
    Cancelled,
    Command,
    Dispatch,
    EngineLost,
    EngineSpec,
    Event,
    Fail,
    Observed,
    Progressed,
    Reason,
    Reject,
    SetClock,
    StartEngine,
    Stepped,
    StopEngine,
    Timer,
)
from throttllem.engines.base import EngineError
from throttllem.gateway.control import rejections as refusals
from throttllem.gateway.control.alarm import LoopTimer
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.inbox import EventQueue
from throttllem.gateway.control.named import done, named
from throttllem.gateway.control.retry_after import RetryEstimator
from throttllem.gateway.control.session import Session
from throttllem.gateway.control.slo_attainment import SloAttainment, judged
from throttllem.gateway.control.ticket import RefusedError
from throttllem.gateway.control.turn import Observer, Turn
from throttllem.gateway.control.watchdog import sweep, tick

log = logging.getLogger("throttllem.gateway")

_AFTER_FAULT_S = 1.0
"""The core that failed is not woken at once again: what failed may still be due."""


class ControlLoop:
    """One controller and the engines of one model. `start`, then requests as `Session`s, then `stop`."""

    def __init__(
        self,
        *,
        controller: Controller,
        links: tuple[Backend, ...],
        limits: LimitOptions,
        now: Callable[[], float],
        witness: Observer,
    ) -> None:
        self.controller = controller
        self.links = links
        self.limits = limits
        self.now = now
        self.promises = SloAttainment()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.counting = 0
        """Requests whose prompts are being counted, before they arrive."""
        self._witness = witness
        self._visits: dict[int, Session] = {}
        self._next_id = 0
        self._inbox = EventQueue(self._handle, self._settled, now)
        self._turn = Turn(controller, self._do_all, self._give_up, witness)
        self._alarm = LoopTimer(lambda: self.tell(Timer()), now)
        self._not_before_s = -math.inf
        self._pace = RetryEstimator()
        self._tasks: list[asyncio.Task[None]] = []

    # ---- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring up the largest engine; the core starts others as it needs them."""
        max(self.links, key=lambda link: link.tp).start(0, self.tell)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(work) for work in (sweep(self), *(tick(link) for link in self.links))]

    async def stop(self) -> None:
        """Let go of everything; requests that still run end with an error."""
        for visit in list(self._visits.values()):
            self.fail(visit, refusals.draining())
        self._inbox.drain()
        self._turn.end()
        self._alarm.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self.links:
            await link.stop()

    # ---- requests --------------------------------------------------------------------------------------------

    def fresh_id(self) -> int:
        """An id that no request had."""
        self._next_id += 1
        return self._next_id

    def arrive(self, visit: Session) -> None:
        """A request came in."""
        self._visits[visit.request.id] = visit
        self.tell(Arrived(request=visit.request))

    def finish(self, visit: Session, tokens: int | None) -> None:
        """A request has its whole answer."""
        visit.ended = True
        self._visits.pop(visit.request.id, None)
        if visit.link is not None:
            if tokens is None:
                visit.generated_tokens = max(visit.generated_tokens, visit.link.tokens_of(visit.request.id))
            visit.energy_j = visit.link.ended(visit.request.id, tokens)
        self._pace.ended(self.now())
        self._book(visit, served=True)

    def leave(self, visit: Session, error: BaseException | None = None) -> None:
        """The HTTP side is done with a request that did not finish: its client left (`error`: a cancel), or the engine
        failed it, or answered with an error below 500 (None), which is no reason to doubt it.
        """
        visit.ended = True
        engine_failed = isinstance(error, EngineError)
        if visit.link is not None and visit.link.state == "up" and engine_failed:
            self._leave_suspect(visit, visit.link)
        else:
            self._forget(visit)
        self._book(visit, served=None if not engine_failed else False)

    def fail(self, visit: Session, failure: RefusedError) -> None:
        """End a request from this side, if it has not ended."""
        if visit.ended:
            return
        self._forget(visit)
        visit.refuse(failure)
        self._book(visit, served=False)

    def spec(self) -> EngineSpec | None:
        """The engine that takes new requests, or the one that did last."""
        serving = self.controller.serving()
        found = [link for link in self.links if link.connected and link.key == serving and serving is not None]
        found = found or [link for link in self.links if link.connected]
        return found[0].connected.spec if found and found[0].connected else None

    def link(self) -> Backend | None:
        """The engine that takes new requests now."""
        serving = self.controller.serving()
        return next((link for link in self.links if serving is not None and link.key == serving), None)

    def retry_after_s(self) -> int:
        """When a refused client may well find a place: the queue ahead of it, at the pace of the last minute."""
        return self._pace.retry_after_s(self.controller.snapshot().queue, self.now())

    def open(self) -> tuple[Session, ...]:
        """Requests that have not ended."""
        return tuple(self._visits.values())

    # ---- the core --------------------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Hand an event to the core and do what it says; what only tells of progress goes in soon. Never raises for
        what the core does: whoever tells has nothing to do with it.
        """
        if isinstance(event, Stepped | Progressed | Observed):
            self._inbox.note(event)
        else:
            self._inbox.tell(event)

    def _handle(self, event: Event, now_s: float) -> None:
        """One turn of the core; a request that it lets in is on its way to the engine before the clocks are planned."""
        self._turn.end()
        commands = self._turn.begin(event, now_s)
        self._do_all(commands)
        if not any(isinstance(command, Dispatch) for command in commands):
            self._turn.end()

    def _settled(self) -> None:
        """No event is left."""
        if self._turn.open:
            asyncio.get_running_loop().call_soon(self._end_turn)
        else:
            self._arm()

    def _end_turn(self) -> None:
        self._turn.end()
        self._arm()

    def _do_all(self, commands: list[Command]) -> None:
        for command in commands:
            try:
                self._do(command)
            except Exception:
                log.exception("%s could not be carried out", type(command).__name__)
                self._give_up(command)

    def _give_up(self, what: Event | Command) -> None:
        """End the requests that something was about that could not be done; the others go on."""
        self._not_before_s = self.now() + _AFTER_FAULT_S
        lost = self.open() if isinstance(what, EngineLost) else ()
        names = {*named(what), *(visit.request.id for visit in lost if visit.link and visit.link.key is None)}
        for visit in [self._visits[request_id] for request_id in names if request_id in self._visits]:
            self.fail(visit, refusals.broken())
        for request_id in done(what):
            self.tell(Cancelled(request_id=request_id))

    def _arm(self) -> None:
        """A timer for the core's deadline, never early."""
        due_s = self.controller.next_deadline()
        due_s = math.inf if due_s is None else max(due_s, self._not_before_s)
        self._alarm.set(due_s)

    def _do(self, command: Command) -> None:
        match command:
            case Dispatch(engine=key, request_id=request_id):
                self._dispatch(key, request_id)
            case Reject(request_id=request_id, why=why) | Fail(request_id=request_id, why=why):
                self._refuse(request_id, why)
            case StartEngine(engine=key, tp=tp):
                self._start(key, tp)
            case SetClock(engine=key) | StopEngine(engine=key):
                self._on_engine(key, command)
            case Cancel():
                pass  # whoever cancelled has let go of it already

    def _refuse(self, request_id: int, why: Reason) -> None:
        visit = self._visits.get(request_id)
        if visit is None:
            return
        failure = refusals.refused(why, visit.request, self.spec(), self.retry_after_s())
        del self._visits[request_id]
        if visit.link is not None:
            visit.energy_j = visit.link.dropped(request_id)
        visit.refuse(failure)
        self._book(visit, served=False)

    def _on_engine(self, key: int, command: SetClock | StopEngine) -> None:
        link = self._by_key(key)
        if link is None:
            return
        if isinstance(command, SetClock):
            link.clock.set(command.plan, self._turn.at_s)
        else:
            link.retire()

    def _dispatch(self, key: int, request_id: int) -> None:
        visit, link = self._visits[request_id], self._by_key(key)
        assert link is not None, f"the core dispatched to engine {key}, which no link holds"
        request = visit.request
        link.dispatched(
            request_id, streams=visit.streams, sequences=request.sequences, prompt_tokens=request.prompt_tokens
        )
        visit.admitted(link, self.now())

    def _start(self, key: int, tp: int) -> None:
        free = [link for link in self.links if link.key is None and link.tp == tp]
        assert free, f"the core asked for a second engine of TP {tp}"
        free[0].start(key, self.tell)

    def _by_key(self, key: int) -> Backend | None:
        return next((link for link in self.links if link.key == key), None)

    # ---- ends ------------------------------------------------------------------------------------------------

    def _forget(self, visit: Session) -> None:
        if self._visits.pop(visit.request.id, None) is None:
            return
        self.tell(Cancelled(request_id=visit.request.id))
        if visit.link is not None:
            visit.energy_j = visit.link.dropped(visit.request.id)

    def _leave_suspect(self, visit: Session, link: Backend) -> None:
        """Its place stays taken until the engine is known to be well, or whoever waits would follow it to its end."""
        request_id = visit.request.id
        self._visits.pop(request_id, None)
        visit.energy_j = link.dropped(request_id)
        link.suspect(lambda: self.tell(Cancelled(request_id=request_id)))

    def _book(self, visit: Session, *, served: bool | None) -> None:
        """`served` None: the client left, and no promise was kept or broken."""
        if visit.generated_tokens or served:
            self.prompt_tokens += visit.request.prompt_tokens * visit.request.sequences
        self.generated_tokens += visit.generated_tokens
        kept: bool | None = None
        if served is not None:
            verdict = judged(visit.request.slo, visit.seen(), served=served)
            self.promises.ended(verdict, self.now())
            kept = bool(verdict.kept) if verdict.promised else None
        self._witness.ended(visit, kept)
