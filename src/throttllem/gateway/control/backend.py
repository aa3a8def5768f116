"""One configured engine and its GPUs: reached, watched, lost and reached again; its steps booked as energy.

The driver owns the core; a link tells it events and is told when to start, to stop and which clock to set.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from throttllem.core.types import EngineLost, EngineReady, Event, Progressed, Stepped
from throttllem.engines.base import Connected, EngineError, LiveEngine, Report
from throttllem.engines.progress import Progress
from throttllem.gateway.control.clock_setter import EngineClock
from throttllem.gateway.energy.accounting import EnergyAccounting
from throttllem.gpu.device import Gpu

log = logging.getLogger("throttllem.gateway")

Tell = Callable[[Event], None]
_FIRST_RETRY_S = 0.2
_LONGEST_RETRY_S = 2.0
_LOOKS = 3
"""So often an engine is looked at before it counts as lost, unless nobody is there at all."""
_LOOK_AGAIN_S = 0.5
_COUNTS_AT_A_TIME = 64


@dataclass(slots=True)
class Backend:
    """One engine. `key` is the core's id for it while the core knows it, None otherwise."""

    name: str
    kind: str
    tp: int
    catalogue_gpu: str
    catalogue_model: str
    engine: LiveEngine
    clock: EngineClock
    booking: EnergyAccounting
    now: Callable[[], float]
    close: Callable[[], Awaitable[None]] | None = None
    key: int | None = None
    state: str = "down"
    own_trouble: str | None = None
    connected: Connected | None = None
    progress: Progress | None = None
    report: Report | None = None
    last_key: int = -1
    """The key that it was started under last."""
    last_sign_s: float = 0.0
    estimated_prompts: int = 0
    counting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_COUNTS_AT_A_TIME))
    """Who asks the engine for the tokens of a prompt holds it."""
    _stepped_s: float = 0.0
    _tell: Tell | None = None
    _task: asyncio.Task[None] | None = None
    _checking: asyncio.Task[None] | None = None
    _if_well: list[Callable[[], None]] = field(default_factory=list)
    _retiring: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str | None:
        """What is wrong with it, in words: with the engine, else with its clock."""
        return self.own_trouble or self.clock.trouble

    @property
    def gpu(self) -> Gpu:
        """Its GPUs."""
        return self.clock.gpu

    # ---- life ------------------------------------------------------------------------------------------------

    def start(self, key: int, tell: Tell) -> None:
        """Bring it up (or wait until it is) under this id; the core hears when it is ready."""
        self.key, self.last_key, self._tell = key, key, tell
        self.state, self.own_trouble = "starting", None
        self._task = asyncio.get_running_loop().create_task(self._live(key, tell), name=f"engine {self.name}")

    def retire(self) -> None:
        """Let go of it, beside whatever else goes on; it may be started again at any time."""
        self.key, self.state = None, "down"
        self.clock.end()
        self.booking.end()
        tasks = [task for task in (self._task, self._checking, *self.clock.tasks) if task is not None]
        before = [self._retiring] if self._retiring is not None else []
        self._retiring = asyncio.get_running_loop().create_task(self._let_go(tasks, before))

    async def stop(self) -> None:
        """Let go of it."""
        self.retire()
        assert self._retiring is not None
        await self._retiring

    async def _let_go(self, tasks: list[asyncio.Task[None]], before: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *before, self.clock.give_back(), return_exceptions=True)
        if self.close is not None:
            await self.close()

    def estimated(self, by: str) -> None:
        """A prompt's tokens were estimated."""
        self.estimated_prompts += 1
        if self.estimated_prompts == 1:
            log.warning("engine %s: the tokens of a prompt were estimated (%s), not counted", self.name, by)

    def suspect(self, well: Callable[[], None] = lambda: None) -> None:
        """A request saw the engine fail: find out at once whether it is there, and call `well` if it is."""
        self._if_well.append(well)
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self._check())

    async def _live(self, key: int, tell: Tell) -> None:
        if self._retiring is not None:
            await asyncio.wait({self._retiring})
        while True:
            connected = await self._reach()
            try:
                await self._take_into_use(key, connected, tell)
                break
            except Exception as error:  # nobody would see that it never came up
                log.exception("engine %s cannot be taken into use", self.name)
                self.state, self.own_trouble = "starting", f"it cannot be taken into use: {error!r}"
            await asyncio.sleep(_LONGEST_RETRY_S)
        try:
            await self.engine.watch(self._reported)
        except EngineError as error:
            self.lose(str(error))
        except Exception as error:  # whatever it is: an engine that is not watched must not look well
            log.exception("engine %s cannot be watched", self.name)
            self.lose(f"it cannot be watched: {error!r}")

    async def _take_into_use(self, key: int, connected: Connected, tell: Tell) -> None:
        self.connected, self.report, self.own_trouble = connected, None, None
        self.progress = Progress(key, exact=connected.named)
        mhz = await self.clock.in_force(connected.spec.clocks_mhz[-1])
        self.last_sign_s = self.now()
        self.booking.begin(connected.spec, exact=connected.named)
        self.state = "up"
        log.info("engine %s is up: %s", self.name, ", ".join(connected.models))
        tell(EngineReady(engine=key, spec=connected.spec))
        self.clock.begin(key, tell, mhz)

    async def _reach(self) -> Connected:
        pause_s = _FIRST_RETRY_S
        while True:
            try:
                return await self.engine.connect()
            except EngineError as error:
                if self.own_trouble != str(error):
                    log.warning("engine %s is not there: %s", self.name, error)
                self.own_trouble = str(error)
            except Exception as error:
                log.exception("engine %s cannot be reached", self.name)
                self.own_trouble = f"it cannot be reached: {error!r}"
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_RETRY_S, pause_s * 1.5)

    async def _check(self) -> None:
        while self._if_well:
            waiting, self._if_well = self._if_well, []
            key = self.key
            try:
                trouble = await self._look()
                if trouble is not None and self.key == key:
                    self.lose(trouble)
            except Exception:  # a fault of ours says nothing of the engine; `watch` looks after it
                log.exception("engine %s cannot be looked at", self.name)
            finally:
                for well in waiting:  # an engine that was lost the core has forgotten: then this is no news
                    well()

    async def _look(self) -> str | None:
        """Why it is gone; None: it is there."""
        for left in reversed(range(_LOOKS)):
            try:
                await self.engine.well()
                return None
            except EngineError as error:
                if not left or error.nobody_there:
                    return str(error)
            await asyncio.sleep(_LOOK_AGAIN_S)
        return None

    def lose(self, why: str) -> None:
        """The engine is gone; what ran on it is lost, and the core decides what comes next."""
        if self.key is None or self.state != "up":
            return
        log.error("engine %s is lost: %s", self.name, why)
        self.own_trouble, self.state = why, "down"
        key, self.key = self.key, None
        self.clock.end()
        self.booking.end()
        self.clock.free()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        assert self._tell is not None
        self._tell(EngineLost(engine=key))

    # ---- requests --------------------------------------------------------------------------------------------

    def dispatched(self, request_id: int, *, streams: bool, sequences: int, prompt_tokens: int) -> None:
        """A request is about to be sent."""
        if self.progress is None:
            return
        if not self.booking.open:
            self.last_sign_s = self.now()
        self.booking.dispatched(request_id, sequences, prompt_tokens * sequences)
        self.progress.dispatched(request_id, streams=streams, sequences=sequences)

    def token(self, request_id: int, count: int) -> None:
        """Tokens of a request came."""
        if self.progress is not None and request_id in self.booking:
            self.last_sign_s = self.now()
            self._take(self.progress.token(request_id, count))

    def tokens_of(self, request_id: int) -> int:
        """Tokens of a request so far, as well as can be told."""
        return (self.progress and self.progress.tokens(request_id)) or 0

    def ended(self, request_id: int, tokens: int | None) -> float | None:
        """A request has its whole answer; its joules."""
        if self.progress is not None and request_id in self.booking:
            self.last_sign_s = self.now()
            self._take(self.progress.ended(request_id, tokens))
        return self.booking.left(request_id)

    def dropped(self, request_id: int) -> float | None:
        """A request is gone before its end; its joules."""
        if self.progress is not None:
            self.progress.dropped(request_id)
        return self.booking.left(request_id)

    def tick(self, step_s: float) -> None:
        """Time passes without any sign of progress to be had (no report, no stream)."""
        if self.progress is not None:
            self._take(self.progress.tick(step_s))

    def _reported(self, report: Report) -> None:
        if self.progress is None:
            return
        before = self.report
        self.report = report
        elapsed_s = self.now() - self._stepped_s
        if report.step is not None:
            self._stepped_s = self.now()
        if report.step is not None and (before is None or report.step != before.step):
            self.last_sign_s = self.now()
        if report.joules is not None:
            for request_id in report.preempted:  # before the iteration, not in it
                self.booking.paused(request_id)
            self.booking.exact(report)
        elif report.prompt_tokens:
            self.booking.prompts(report.prompt_tokens)
        self._take(self.progress.report(report, elapsed_s=elapsed_s), exact=report.joules is not None)

    def _take(self, events: Iterable[Event], *, exact: bool = False) -> None:
        """Hand events on to the core; steps that are not booked yet are booked by the time that they took."""
        assert self._tell is not None
        for event in events:
            match event:
                case Stepped(started=started, preempted=preempted, finished=finished):
                    if not exact:
                        self.booking.stepped(started)
                    for request_id in started:
                        self.booking.joined(request_id)
                    for request_id in (*preempted, *finished):
                        self.booking.paused(request_id)
                case Progressed(request_id=request_id):
                    self.booking.joined(request_id)
            if self.key is not None:
                self._tell(event)
