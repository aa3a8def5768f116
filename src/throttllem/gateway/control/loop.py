"""The control loop of one model: events into the core as they happen, its commands carried out on real engines.

`handle(event)`, carry out, arm the timer. It owns the wall clock and the open requests; every decision is the core's.
Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple, Protocol

from throttllem.config import LimitOptions
from throttllem.core.controller import Controller, PlanningError
from throttllem.core.types import (
    Arrived,
    Cancel,
    Cancelled,
    ClockRead,
    Command,
    Dispatch,
    EngineLost,
    EngineReady,
    EngineSpec,
    Event,
    Fail,
    Observed,
    Progressed,
    RateChanged,
    Reason,
    Reject,
    SetClock,
    StartEngine,
    Stepped,
    StopEngine,
    Timer,
    Uncontrolled,
)
from throttllem.engines.base import EngineError, OwnLimitError
from throttllem.gateway.control import rejections
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.retry_after import RetryEstimator
from throttllem.gateway.control.session import Session
from throttllem.gateway.control.slo_attainment import SloAttainment, judged
from throttllem.openai_api.errors import ApiError, internal_error

log = logging.getLogger("throttllem.gateway")

_SWEEP_S = 0.25
"""Limits are enforced this often while requests are open."""
_SETTLE_S = 1.0
_FLUSH_S = 0.5
"""What the core did is handed to the observer at most this much later."""
_EXTERNAL_S = 1.0
"""External load must last this long before it is logged: for a moment, counts may be of different times."""
_AFTER_FAULT_S = 1.0
"""After a fault the core is not called again at once for a deadline: what failed may still be due."""
_FAULTY_REQUESTS = 3
"""If the core fails at this many requests in a row, its state of the engines is at fault, not the requests."""
_LOOP_CLOCK_S = 0.001
"""The event loop's clock may be this much coarser than ours."""
_HELD_RECORDS = 4096


class Handled(NamedTuple):
    """One call of the core: `commands` None: it raised. `seconds` it took."""

    now_s: float
    event: Event
    commands: list[Command] | None
    seconds: float


class Observer(Protocol):
    """Keeps what happened: the flight recorder and the histograms of `/metrics`."""

    def handled(self, calls: list[Handled]) -> None:
        """Calls of the core since the last time, in order; the core has handled nothing since. None of them: write out
        what is held back.
        """

    def ended(self, session: Session, met: bool | None) -> None:
        """A request ended; `met`: all its SLOs, None if it had none or its client disconnected."""


class ControlLoop:
    """One controller and the backends of one model. `start`, then requests as `Session`s, then `stop`."""

    def __init__(
        self,
        *,
        controller: Controller,
        backends: tuple[Backend, ...],
        limits: LimitOptions,
        now: Callable[[], float],
        observer: Observer,
    ) -> None:
        self.controller = controller
        self.backends = backends
        self.limits = limits
        self.now = now
        self.slo_attainment = SloAttainment()
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generated_tokens = 0
        self.estimated_outputs = 0
        self.counting = 0
        """Requests whose prompts are being counted, before they arrive."""
        self.doubtful = False
        """The core failed, and no request that came since was served."""
        self.core_faults = 0
        """Events at which the core raised an exception."""
        self.engine_rebuilds = 0
        """Engines whose state in the core was built again after one."""
        self._observer = observer
        self._sessions: dict[int, Session] = {}
        self._next_id = 0
        self._events: deque[tuple[Event, float]] = deque()
        self._handling = False
        self._calls: list[Handled] = []
        self._timer: asyncio.Handle | None = None
        self._timer_s = math.inf
        self._retry = RetryEstimator()
        self._flushing: asyncio.TimerHandle | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._up_s = self._settled_s = -math.inf
        self._without_external_s: dict[int, float] = {}
        self._stopped = False
        self._not_before_s = -math.inf
        self._failed_s = -math.inf
        self._faulty_requests = 0
        self._rebuilt_s: dict[str, float] = {}
        self._in_doubt: set[int] = set()
        """Keys of engines whose state is to be built again: no clock is set by it."""

    # ---- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring up all engines of a pool; else the largest, and the core starts others as it needs them. Of those that
        a gateway before this one left running, one is taken into use where the policy selects the size, and the others
        are stopped.
        """
        self._up_s = self._settled_s = self.now()
        self._sweep_in(_SWEEP_S)
        if self.controller.options.pool is not None:
            self.handle(Timer())
            return
        found = [backend for backend in self.backends if await backend.process.runs()]
        scales = self.controller.options.autoscale is not None
        first = max(found if found and scales else self.backends, key=lambda backend: backend.tp)
        for backend in found:
            if backend is not first:
                backend.retire()
        first.start(0, self.handle)

    async def stop(self) -> None:
        """Disconnect from the engines; requests that still run end with an error."""
        self._stopped = True
        for session in list(self._sessions.values()):
            self.fail(session, rejections.draining())
        for timer in (self._timer, self._flushing, self._sweeping):
            if timer is not None:
                timer.cancel()
        for backend in self.backends:
            await backend.stop()
        self.flush()

    def _ensure_engine(self) -> None:
        """Start the largest engine, under a key that no engine had, if none is up or starting."""
        if all(backend.key is None for backend in self.backends):
            largest = max(self.backends, key=lambda backend: backend.tp)
            largest.start(1 + max(backend.last_key for backend in self.backends), self.handle)

    # ---- requests --------------------------------------------------------------------------------------------

    def fresh_id(self) -> int:
        """An id that no request had."""
        self._next_id += 1
        return self._next_id

    def open(self) -> tuple[Session, ...]:
        """Requests that have not ended."""
        return tuple(self._sessions.values())

    def arrive(self, session: Session) -> None:
        """A request came in."""
        if not self._sessions:
            self._sweep_in(_SWEEP_S)
        self._sessions[session.request.id] = session
        self.handle(Arrived(request=session.request))

    def finish(self, session: Session, tokens: int | None) -> None:
        """A request has its whole output."""
        session.ended = True
        request_id, backend = session.request.id, session.backend
        self._sessions.pop(request_id, None)
        if backend is not None:
            if tokens is None and backend.progress is not None:
                seen = min(
                    backend.progress.seen_tokens(request_id), session.request.max_tokens * session.request.sequences
                )
                session.generated_tokens = max(session.generated_tokens, seen)
            if backend.prefixes is not None and session.usage.cached_tokens is not None:
                backend.prefixes.served(request_id, session.usage.cached_tokens)
            if session.count.parts and session.usage.prompt_tokens:
                backend.learn_parts(session.count.parts, session.usage.prompt_tokens - session.count.tokens)
            backend.ended(request_id, tokens)
            session.energy_j = backend.left(request_id)
        self._retry.ended(self.now())
        if session.request.arrival_s >= self._failed_s:
            self.doubtful, self._faulty_requests = False, 0
        self._count(session, served=True)

    def leave(self, session: Session, error: BaseException | None = None) -> None:
        """The HTTP side is done with a request that did not finish: its client disconnected (`error`: a cancellation),
        the engine failed it, or answered with an error below 500 (None), which is no reason to suspect the engine.
        """
        session.ended = True
        request_id, backend = session.request.id, session.backend
        engine_failed = isinstance(error, EngineError) and not isinstance(error, OwnLimitError)
        if backend is not None and backend.state == "up" and engine_failed:
            # Its place stays taken until the engine is known to be well, or the next request would follow it there.
            self._sessions.pop(request_id, None)
            session.energy_j = backend.left(request_id)
            backend.suspect(if_healthy=Cancelled(request_id=request_id))
        else:
            self._forget(session)
        self._count(session, served=False if engine_failed else None)

    def come_back(self, session: Session) -> None:
        """An engine broke off a request before its client got a byte: it is tried once more, as soon as the engine is
        known to be well or lost.
        """
        backend = session.backend
        if backend is None or backend.state != "up":
            return self.leave(session, EngineError("the engine is gone"))
        backend.left(session.request.id)
        session.checking = True
        session.came_back(interrupt=False)
        backend.suspect(if_healthy=Cancelled(request_id=session.request.id))

    def _came_back(self, request_id: int) -> bool:
        """The core has taken a request out of an engine: whether it is tried once more, with its arrival and SLO. The
        joules of its first try stay those of the engine.
        """
        session = self._sessions.get(request_id)
        if session is None or not (session.checking or session.returns):
            return False
        if not session.checking:
            assert session.backend is not None
            session.backend.left(request_id)
            session.came_back(interrupt=True)
        session.checking = False
        log.warning("request %d had no byte when its engine ended it: it is tried once more", request_id)
        self.handle(Arrived(request=session.request, again=True))
        return True

    def fail(self, session: Session, failure: ApiError) -> None:
        """End a request from this side, if it has not ended."""
        if session.ended:
            return
        self._forget(session)
        session.fail(failure)
        self._count(session, served=False)

    def _forget(self, session: Session) -> None:
        request_id = session.request.id
        if self._sessions.pop(request_id, None) is not None:
            self.handle(Cancelled(request_id=request_id))
            if session.backend is not None:
                session.energy_j = session.backend.left(request_id)

    def _count(self, session: Session, *, served: bool | None) -> None:
        """`served` None: the client disconnected, and no SLO was met or violated."""
        if session.generated_tokens or served:
            self.prompt_tokens += session.prompt_tokens
            self.cached_prompt_tokens += session.usage.cached_tokens or 0
            self.estimated_outputs += session.usage.output_tokens is None
        self.generated_tokens += session.generated_tokens
        met: bool | None = None
        if served is not None:
            verdict = judged(session.request.slo, session.latencies(), served=served)
            self.slo_attainment.ended(verdict, self.now())
            met = bool(verdict.met) if verdict.with_slo else None
        self._observer.ended(session, met)

    # ---- engines ---------------------------------------------------------------------------------------------

    def serving(self) -> Backend | None:
        """The backend that takes new requests now; of several the one with the least to do."""
        return min(
            self.all_serving(), key=lambda one: one.in_flight + one.uncontrolled_requests + one.calls, default=None
        )

    def all_serving(self) -> list[Backend]:
        """The backends that take new requests now."""
        return [one for one in self.backends if one.key is not None and self.controller.serves(one.key)]

    def spec(self) -> EngineSpec | None:
        """The engine that takes new requests, or one that did."""
        serving = self.serving()
        for backend in (serving, *self.backends):
            if backend is not None and backend.connected:
                return backend.connected.spec
        return None

    def retry_after_s(self) -> int:
        """When a rejected client may find a place: the queue ahead of it, at the rate of the last minute."""
        return self._retry.retry_after_s(self.controller.snapshot().queue, self.now())

    def _by_key(self, key: int) -> Backend | None:
        for backend in self.backends:
            if backend.key == key:
                return backend
        return None

    # ---- the core --------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Hand an event to the core, carry its commands out, arm the timer. An event that comes up meanwhile waits its
        turn, so the core sees one after the other and time never goes back. Never raises for what the core does.
        """
        events = self._events
        events.append((event, self.now()))
        if self._handling:
            return
        self._handling = True
        try:
            while events:
                event, now_s = events.popleft()
                began_s = perf_counter()
                due_s = self.controller.next_deadline() if isinstance(event, Timer) else None
                try:
                    commands = self.controller.handle(event, now_s)
                except Exception as error:
                    log.exception("the control core failed at %s", type(event).__name__)
                    self.core_faults += 1
                    self._calls.append(Handled(now_s, event, None, perf_counter() - began_s))
                    self._could_not(event, error)
                    continue
                self._calls.append(Handled(now_s, event, commands, perf_counter() - began_s))
                for command in commands:
                    try:
                        self._carry_out(command, now_s if due_s is None else due_s)
                    except Exception as error:
                        log.exception("%s could not be carried out", type(command).__name__)
                        self._could_not(command, error)
        finally:
            self._handling = False
        if len(self._calls) > _HELD_RECORDS:
            self.flush()
        elif self._flushing is None and not self._stopped:
            self._flushing = asyncio.get_running_loop().call_later(_FLUSH_S, self._flush)
        self._arm()

    def flush(self) -> None:
        """Hand what the core did since the last time to the observer."""
        calls, self._calls = self._calls, []
        if calls:
            self._observer.handled(calls)

    def _flush(self) -> None:
        self._flushing = None
        if self._calls:
            self._flushing = asyncio.get_running_loop().call_later(_FLUSH_S, self._flush)
            self.flush()
        else:  # it may not have been able to write the last of them
            self._observer.handled([])

    def _carry_out(self, command: Command, since_s: float) -> None:
        match command:
            case Dispatch(engine=key, request_id=request_id):
                session, backend = self._sessions[request_id], self._by_key(key)
                assert backend is not None, f"the core dispatched to engine {key}, which no backend holds"
                request = session.request = session.request.on(key)
                backend.dispatched(
                    request_id,
                    streams=session.streams,
                    sequences=request.sequences,
                    prompt_tokens=request.computed_prompt_tokens,
                    blocks=session.count.blocks,
                )
                session.dispatched(backend, self.now())
            case SetClock(engine=key, plan=plan):
                if key not in self._in_doubt and (backend := self._by_key(key)):
                    backend.clock.set(plan, since_s)
            case Reject(request_id=request_id, why=why):
                self._reject(request_id, why)
            case Fail(request_id=request_id, why=why):
                if not self._came_back(request_id):
                    self._reject(request_id, why)
            case StartEngine(engine=key, tp=tp):
                free = [backend for backend in self.backends if backend.key is None and backend.tp == tp]
                assert free, f"the core commanded one engine of TP {tp} more than there are"
                free[0].start(key, self.handle)
            case StopEngine(engine=key):
                if backend := self._by_key(key):
                    backend.retire()
            case Cancel(request_id=request_id):
                # Of others the session was closed before the core got the event.
                if (left := self._sessions.get(request_id)) is not None and left.checking:
                    self._came_back(request_id)

    def _reject(self, request_id: int, why: Reason) -> None:
        session = self._sessions.pop(request_id, None)
        if session is None:
            return
        if session.backend is not None:
            session.energy_j = session.backend.left(request_id)
        failure = rejections.rejected(why, session.request, self.spec(), self.retry_after_s())
        session.fail(failure)
        # What no engine could serve is the client's error, as a malformed body is: no SLO was violated.
        self._count(session, served=None if failure.status == 400 else False)

    def _arm(self) -> None:
        """A timer for the core's deadline, never early. A deadline that has come is handled in the loop's next round:
        what was just dispatched is on its way before clocks are planned, and events of one round share a plan.
        """
        deadline_s = self.controller.next_deadline()
        due_s = math.inf if deadline_s is None or self._stopped else max(deadline_s, self._not_before_s)
        if due_s == self._timer_s:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_s = due_s
        if due_s < math.inf:
            loop, wait_s = asyncio.get_running_loop(), due_s - self.now()
            self._timer = loop.call_soon(self._due) if wait_s <= 0 else loop.call_later(wait_s, self._due)

    def _due(self) -> None:
        if self.now() < self._timer_s:
            self._timer = asyncio.get_running_loop().call_later(_LOOP_CLOCK_S, self._due)
            return
        self._timer, self._timer_s = None, math.inf
        self.handle(Timer())

    # ---- faults ----------------------------------------------------------------------------------------------

    def _could_not(self, what: Event | Command, error: Exception) -> None:
        """End the requests that an event or a command was about that could not be handled; the others go on. A failure
        at an engine's event leaves the core's state of that engine in doubt: it counts as lost and is connected again.
        """
        now_s = self.now()
        self._not_before_s = now_s + _AFTER_FAULT_S
        suspects = self._suspects(what, error)
        if suspects is not None:
            self.doubtful, self._failed_s = True, now_s
        for backend in suspects or ():
            self._rebuild(backend)
        for request_id in self._affected(what):
            if session := self._sessions.get(request_id):
                self.fail(session, internal_error())
        if isinstance(what, Stepped):
            for request_id in what.finished:  # these have their output, but their places must be freed
                self.handle(Cancelled(request_id=request_id))

    def _suspects(self, what: Event | Command, error: Exception) -> tuple[Backend, ...] | None:
        """Backends whose state in the core is in doubt; None: a failure at `what` puts no state in doubt."""
        match what:
            case Arrived() | Dispatch():
                self._faulty_requests += 1
                return self.backends if self._faulty_requests >= _FAULTY_REQUESTS else ()
            case Stepped() | Progressed() | Observed() | RateChanged() | Uncontrolled() | ClockRead() | EngineReady():
                return tuple(backend for backend in self.backends if backend.key == what.engine)
            case Timer() if isinstance(error, PlanningError):
                return tuple(backend for backend in self.backends if backend.key == error.engine)
            case Timer() | Cancelled():
                return self.backends
            case EngineLost():
                self._later(_AFTER_FAULT_S, lambda: self.handle(what))
                self._later(0.0, self._ensure_engine)
                return ()
            case StartEngine():
                self._later(0.0, self._ensure_engine)
                return ()
        return None

    def _affected(self, what: Event | Command) -> tuple[int, ...]:
        """Requests that cannot go on without this event or command."""
        match what:
            case Arrived(request=request):
                return (request.id,)
            case Stepped(started=started, preempted=preempted):
                return started + preempted
            case Progressed() | Cancelled() | Dispatch() | Reject() | Fail() | Cancel():
                return (what.request_id,)
            case EngineLost():
                return tuple(key for key, one in self._sessions.items() if one.backend and one.backend.key is None)
        return ()

    def _rebuild(self, backend: Backend) -> None:
        """Build the core's state of an engine again, soon: the task that watches the engine may run this very call.

        Until then its clocks are restored, as what the core knows of it may be wrong.
        """
        key = backend.key
        if key is None or key in self._in_doubt:
            return
        self._in_doubt.add(key)
        backend.clock.free()

        def rebuild() -> None:
            self._in_doubt.discard(key)
            if backend.key == key:
                self.engine_rebuilds += 1
                self._rebuilt_s[backend.name], self._faulty_requests = self.now(), 0
                backend.lose("the control core failed at one of its events; its state is built again")
                self._ensure_engine()

        last_s = self._rebuilt_s.get(backend.name, -math.inf)
        self._later(max(0.0, last_s + _AFTER_FAULT_S - self.now()), rebuild)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        def run() -> None:
            if not self._stopped:
                work()

        loop = asyncio.get_running_loop()
        if seconds > 0:
            loop.call_later(seconds, run)
        else:
            loop.call_soon(run)

    # ---- limits ----------------------------------------------------------------------------------------------

    def _sweep_in(self, seconds: float) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._sweeping = asyncio.get_running_loop().call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        """A few times a second while requests are open, else once: end requests that wait too long, settle energy, look
        at clocks and external load.
        """
        try:
            now_s = self.now()
            if self.controller.serving() is not None:
                self._up_s = now_s
            for session in self.open() if self._sessions else ():
                if failure := self.overdue(session, self._up_s, now_s):
                    self.fail(session, failure)
            slow = not self._sessions or now_s - self._settled_s >= _SETTLE_S
            self._settled_s = now_s if slow else self._settled_s
            for backend in self.backends:
                if slow or backend.in_flight:
                    backend.accounting.settle()
                backend.clock.look()
            if slow and any(backend.report is not None for backend in self.backends):
                self._without_external_s = self._external_load(self._without_external_s)
        except Exception:  # the limits must hold after it too
            log.exception("limits were not enforced this time")
        self._sweep_in(_SWEEP_S if self._sessions else _SETTLE_S)

    def overdue(self, session: Session, up_s: float, now_s: float) -> ApiError | None:
        """What ends a request now, None if nothing does. `up_s`: when an engine was up last.

        A byte of its output is a sign of life of a request, and so is whatever shows that the engine works, as engines
        hold back output (a tool call is parsed whole). That ends where the engine has reported for as long that it
        holds fewer requests than it should, or where no token came for `limits.request_s`.
        """
        limits, backend = self.limits, session.backend
        if session.dispatched_s is None or backend is None:
            if now_s - session.request.arrival_s > limits.queue_wait_s:
                return rejections.queue_timeout(limits.queue_wait_s, self.retry_after_s())
            if now_s - max(up_s, session.request.arrival_s) > limits.engine_wait_s:
                return rejections.no_engine(next((one.trouble for one in self.backends if one.trouble), None))
            return None
        if now_s - max(session.dispatched_s, session.last_token_s or 0.0) > limits.request_s:
            return rejections.request_stalled(limits.request_s)
        last_byte_s = session.last_byte_s(now_s)
        if now_s - last_byte_s <= limits.silence_s:
            return None
        if not session.streams and backend.report is None:
            return None  # nothing can be seen of an answer in one piece before it comes
        if now_s - backend.last_sign_s > limits.silence_s:
            return rejections.engine_silent(limits.silence_s)
        if backend.lacking_s is None or now_s - backend.lacking_s <= limits.silence_s:
            return None
        # Which of its requests the engine lacks is not reported: the one that was silent for longest, then it is seen.
        there = [other for other in self._sessions.values() if other.backend is backend]
        if last_byte_s > min(other.last_byte_s(now_s) for other in there):
            return None
        return rejections.request_lost(limits.silence_s)

    def _external_load(self, without_s: dict[int, float]) -> dict[int, float]:
        """Log when other clients have come into an engine. `without_s`: when each engine was last seen without them,
        infinite once it was logged; returns the next one.
        """
        now_s, found = self.now(), {}
        for view in self.controller.snapshot().engines:
            found[view.engine] = since_s = now_s if view.external_sequences == 0 else without_s.get(view.engine, now_s)
            if now_s - since_s >= _EXTERNAL_S:
                found[view.engine] = math.inf
                log.warning(
                    "engine of TP %d: %d sequences in it are not ours: does another gateway or client use it?",
                    view.tp,
                    view.external_sequences,
                )
        return found
