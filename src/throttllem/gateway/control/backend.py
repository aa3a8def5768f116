"""One configured engine with its GPUs: connected, watched, lost and connected again.

It reports events to the control loop, which alone decides when it starts, stops and which clock is set.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from throttllem.core.types import EngineLost, EngineReady, Event, Uncontrolled
from throttllem.engines.base import Connected, EngineError, LiveEngine, OwnLimitError, Report
from throttllem.engines.prefix_cache import Blocks, PrefixCache
from throttllem.engines.progress import Progress
from throttllem.gateway.control.clock_setter import ClockSetter
from throttllem.gateway.control.engine_model import EngineModel
from throttllem.gateway.control.engine_process import EngineProcess
from throttllem.gateway.energy.accounting import EnergyAccounting
from throttllem.gpu.device import Gpu
from throttllem.launchers.base import Ended

log = logging.getLogger("throttllem.gateway")

Emit = Callable[[Event], None]
_FIRST_RETRY_S = 0.2
_LONGEST_RETRY_S = 2.0
_HEALTH_CHECKS = 3
"""An engine that is suspected counts as lost after this many failed checks, or one refused connection."""
_NEXT_CHECK_S = 0.5
_COUNTS_AT_A_TIME = 64
_LARGE_COUNTS_AT_A_TIME = 2
_STALLED_AFTER_S = 10.0
_NAMES_AGAIN_S = 1.0
"""An engine is asked for its models no sooner after the last time, however many unknown names clients send."""
_UNKNOWN_STEP_S = 0.05
_LEARNED = 0.25
"""Of a new value in a mean that follows."""
_SHORTEST_STEP_S = 0.005
_EMPTY_S = 0.05
_LOOK_LIMIT_S = 1.0
"""The last bytes of a stream wait this long at most for the counters of its engine."""


@dataclass(slots=True, eq=False)
class Backend:
    """One engine. `key` is the core's id for it while the core knows it, None otherwise."""

    name: str
    kind: str
    tp: int
    catalogue_gpu: str
    model: EngineModel
    engine: LiveEngine
    clock: ClockSetter
    accounting: EnergyAccounting
    process: EngineProcess
    now: Callable[[], float]
    gpu_notes: tuple[str, ...] = ()
    """What is to be known of the kind of its GPUs."""
    close: Callable[[], Awaitable[None]] | None = None
    key: int | None = None
    last_key: int = -1
    """The key of its last start."""
    state: str = "down"
    own_trouble: str | None = None
    named_s: float = -math.inf
    """When the engine was last asked for the models that it serves, since it is up."""
    naming: asyncio.Lock = field(default_factory=asyncio.Lock)
    connected: Connected | None = None
    progress: Progress | None = None
    report: Report | None = None
    part_tokens: float = 256.0
    """Prompt tokens of a picture or sound, learned from what the engine reports of whole prompts; before, a guess."""
    prefixes: PrefixCache | None = None
    """What its prefix cache holds; None: it has none."""
    last_sign_s: float = 0.0
    """When the engine last showed that it works: a byte, a step, a count that changed."""
    lacking_s: float | None = None
    """Since when it has reported fewer requests than were sent to it; None: it reports them all, or no counts."""
    uncontrolled_requests: int = 0
    """Requests in the engine that compute without control."""
    calls: int = 0
    """Prompts whose tokens it counts now."""
    estimated_prompts: int = 0
    counting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_COUNTS_AT_A_TIME))
    """Held while the engine counts the tokens of a prompt."""
    counting_large: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_LARGE_COUNTS_AT_A_TIME))
    """The same for large prompts: counting one takes seconds, in which small ones go on."""
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the engine's counters are read between two of its reports."""
    _emit: Emit | None = None
    _stepped_s: float = 0.0
    _numbers_steps: bool = False
    _task: asyncio.Task[None] | None = None
    _checking: asyncio.Task[None] | None = None
    _if_healthy: list[tuple[int | None, Event]] = field(default_factory=list)
    _retiring: asyncio.Task[None] | None = None
    _timer: asyncio.TimerHandle | None = None

    @property
    def trouble(self) -> str | None:
        """What is wrong with the engine, else with its clock; None: nothing is."""
        return self.own_trouble or self.clock.trouble

    @property
    def gpu(self) -> Gpu:
        """Its GPUs."""
        return self.accounting.gpu

    @property
    def in_flight(self) -> int:
        """Requests in the engine."""
        return 0 if self.progress is None else len(self.progress.in_flight)

    def health(self, silence_s: float) -> tuple[str, str | None]:
        """Its state, and what is wrong. Up means that it also moves: one that holds requests and shows no progress has
        stalled.
        """
        still_s = self.now() - self.last_sign_s
        if self.state == "up" and self.in_flight and still_s > min(_STALLED_AFTER_S, silence_s / 2):
            return "stalled", f"no sign of progress for {still_s:.0f} s"
        return self.state, self.trouble

    # ---- life ------------------------------------------------------------------------------------------------

    def start(self, key: int, emit: Emit) -> None:
        """Connect, or wait until that succeeds, under this key; then EngineReady is emitted."""
        self.key, self.last_key, self._emit = key, key, emit
        self.state, self.own_trouble = "starting", None
        self._task = asyncio.get_running_loop().create_task(self._live(key, emit), name=f"engine {self.name}")

    def retire(self, *, at_end: bool = False) -> None:
        """Disconnect in the background once nothing of the gateway is in the engine, and stop its process if a launcher
        runs it. It may be started again at any time. `at_end`: the gateway ends, at once, and the process may go on.
        """
        self.key, self.state = None, "down"
        self._disconnected()
        tasks = [task for task in (self._task, self._checking, *self.clock.tasks) if task is not None]
        before = [self._retiring] if self._retiring is not None else []
        self._retiring = asyncio.get_running_loop().create_task(self._let_go(tasks, before, at_end=at_end))

    async def stop(self) -> None:
        """Disconnect and wait for it; the gateway ends."""
        self.retire(at_end=True)
        assert self._retiring is not None
        await self._retiring

    async def _let_go(self, tasks: list[asyncio.Task[None]], before: list[asyncio.Task[None]], *, at_end: bool) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *before, self.clock.restore(), return_exceptions=True)
        while not at_end and (self.calls or self.uncontrolled_requests):
            await asyncio.sleep(_EMPTY_S)
        if self.close is not None:
            await self.close()
        await (self.process.let_go() if at_end and self.process.keep_running else self.process.stop())

    async def _live(self, key: int, emit: Emit) -> None:
        if self._retiring is not None:
            await asyncio.wait({self._retiring})
        while True:
            connected = await self._connect()
            try:
                await self._take_into_use(key, connected, emit)
                break
            except Exception as error:  # otherwise nothing would show that it never came up
                log.exception("engine %s cannot be taken into use", self.name)
                self.state, self.own_trouble = "starting", f"it cannot be taken into use: {error!r}"
            await asyncio.sleep(_LONGEST_RETRY_S)
        try:
            await self.engine.watch(self._reported)
        except EngineError as error:
            self.lose(str(error))
        except Exception as error:  # an engine that is not watched must not look healthy
            log.exception("engine %s cannot be watched", self.name)
            self.lose(f"it cannot be watched: {error!r}")

    async def _connect(self) -> Connected:
        pause_s = _FIRST_RETRY_S
        while True:
            try:
                await self.process.run(self._process_ended)
                connected = await self.engine.connect()
                if refused := self.model.refused(connected):
                    raise EngineError(refused)
                return connected
            except EngineError as error:
                if self.own_trouble != str(error):
                    log.warning("engine %s is not taken into use: %s", self.name, error)
                self.own_trouble = str(error)
            except Exception as error:
                log.exception("engine %s cannot be reached", self.name)
                self.own_trouble = f"it cannot be reached: {error!r}"
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_RETRY_S, pause_s * 1.5)

    async def _take_into_use(self, key: int, connected: Connected, emit: Emit) -> None:
        self.connected, self.report, self.own_trouble, self.lacking_s = connected, None, None, None
        self.named_s = -math.inf
        if self.kind != "simulated":
            self.model.reached(connected)
        self.progress = Progress(key, exact=connected.named)
        spec = connected.spec
        self.prefixes = (
            PrefixCache(block_tokens=spec.block_tokens, kv_blocks=spec.kv_blocks) if spec.prefix_caching else None
        )
        mhz = await self.clock.in_force(connected.spec.clocks_mhz[-1])
        self.last_sign_s = self._stepped_s = self.now()
        self.accounting.begin(connected.spec, self.progress)
        self.state = "up"
        self.process.up()
        log.info("engine %s is up: %s", self.name, ", ".join(connected.models))
        for note in connected.notes:
            log.info("engine %s: %s", self.name, note)
        emit(EngineReady(engine=key, spec=connected.spec))
        if self.uncontrolled_requests:
            emit(Uncontrolled(engine=key, requests=self.uncontrolled_requests))
        self.clock.begin(key, emit, mhz)

    def _process_ended(self, ended: Ended) -> None:
        """What a launcher has only lost sight of is checked, as it may serve on."""
        if ended.certain:
            self.lose(ended.why)
        elif self.state == "up":
            self.suspect()

    def lose(self, why: str) -> None:
        """The engine is gone: EngineLost is emitted, and the core decides what comes next."""
        if self.key is None or self.state != "up":
            return
        log.error("engine %s is lost: %s", self.name, why)
        self.own_trouble, self.state = why, "down"
        key, self.key = self.key, None
        self._disconnected()
        self.process.down()
        self.clock.free()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        assert self._emit is not None
        self._emit(EngineLost(engine=key))

    def _disconnected(self) -> None:
        self.clock.end()
        self.accounting.end()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- suspicion -------------------------------------------------------------------------------------------

    def suspect(self, if_healthy: Event | None = None) -> None:
        """A request saw the engine fail: check it at once. `if_healthy` is emitted if it turns out to be well; a lost
        engine's requests are ended by EngineLost.
        """
        if if_healthy is not None:
            self._if_healthy.append((self.key, if_healthy))
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self._check())

    async def _check(self) -> None:
        while True:
            waiting, self._if_healthy = self._if_healthy, []
            key = self.key
            try:
                trouble = await self._health()
                if trouble is not None and self.key == key:
                    self.lose(trouble)
            except Exception:  # a fault of ours is no evidence against the engine; `watch` goes on
                log.exception("the health of engine %s cannot be checked", self.name)
            finally:
                for suspected, event in waiting:
                    assert self._emit is not None
                    if self.key == suspected:  # else the engine is lost, and its requests may be elsewhere by now
                        self._emit(event)
            if not self._if_healthy:
                return

    async def _health(self) -> str | None:
        """Why it is gone; None: it is there."""
        for left in reversed(range(_HEALTH_CHECKS)):
            try:
                await self.engine.well()
                return None
            except OwnLimitError:
                pass
            except EngineError as error:
                if not left or error.unreachable:
                    return str(error)
            await asyncio.sleep(_NEXT_CHECK_S)
        return None

    # ---- requests --------------------------------------------------------------------------------------------

    def dispatched(
        self, request_id: int, *, streams: bool, sequences: int, prompt_tokens: int, blocks: Blocks = ()
    ) -> None:
        """A request is about to be sent. `prompt_tokens`: those that the engine must compute, of all its sequences."""
        progress = self.progress
        if progress is None:
            return
        if not progress.in_flight:
            self.last_sign_s = self.now()
        self.accounting.dispatching()
        progress.dispatched(request_id, streams=streams, sequences=sequences, prompt_tokens=prompt_tokens)
        if self.prefixes is not None:
            self.prefixes.sent(request_id, blocks)
        if not streams:
            self._arm()

    async def read_counters(self, request_id: int) -> None:
        """A stream ended without a count. Read the engine's counters if its tokens could only be guessed otherwise."""
        progress, look = self.progress, self.connected.look if self.connected is not None else None
        if progress is None or look is None or not progress.needs_counts(request_id):
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_LIMIT_S), self.looking:
                if progress.needs_counts(request_id):  # another stream's end may have shown it meanwhile
                    await look()

    def ended(self, request_id: int, tokens: int | None) -> None:
        """A request has its whole output, of `tokens` where the engine reported it."""
        if self.progress is not None and request_id in self.progress.in_flight:
            self.last_sign_s = self.now()
            assert self._emit is not None
            for event in self.progress.ended(request_id, tokens):
                self._emit(event)

    def left(self, request_id: int) -> float | None:
        """Nothing of a request is in the engine any more; its joules, None if it never ran."""
        progress = self.progress
        if progress is None or request_id not in progress.in_flight:
            return None
        self.accounting.settle(ending=len(progress.in_flight) == 1)
        flight = progress.left(request_id)
        if self.prefixes is not None:
            self.prefixes.left(request_id)
        assert flight is not None
        self._compare_counts()
        self._arm()
        if not self.accounting.known():
            return None
        return flight.energy_j if flight.charged_prompt_tokens or flight.charged_output_tokens else None

    @contextmanager
    def uncontrolled(self) -> Iterator[None]:
        """A request that computes is in the engine without control while in the block."""
        self._uncontrolled(+1)
        try:
            yield
        finally:
            self._uncontrolled(-1)

    def _uncontrolled(self, change: int) -> None:
        self.uncontrolled_requests += change
        self.accounting.uncontrolled(self.uncontrolled_requests)
        if self.key is not None and self.state == "up" and self._emit is not None:
            self._emit(Uncontrolled(engine=self.key, requests=self.uncontrolled_requests))

    def learn_parts(self, parts: int, tokens: int) -> None:
        """The engine reported a prompt whose `parts` that are no text were `tokens`."""
        self.part_tokens += _LEARNED * (max(0, tokens) / parts - self.part_tokens)

    async def read_names(self) -> None:
        """Ask the engine which models it serves now, if that was not done just before; if it does not say, the names
        stay as they are.
        """
        async with self.naming:
            connected = self.connected
            if connected is None or self.state != "up" or self.now() - self.named_s < _NAMES_AGAIN_S:
                return
            self.named_s = self.now()
            try:
                cards = await self.engine.cards()
            except EngineError as error:
                log.warning("engine %s: its models cannot be read again: %s", self.name, error)
                return
            if self.connected is connected:
                self.connected = replace(connected, models=tuple(cards), cards=cards)
                if self.connected.models != connected.models:
                    log.info("engine %s serves other models now: %s", self.name, ", ".join(cards))

    def estimated(self, by: str) -> None:
        """A prompt's tokens were estimated, not counted."""
        self.estimated_prompts += 1
        if self.estimated_prompts == 1:
            log.warning("engine %s: the tokens of a prompt were estimated (%s), not counted", self.name, by)

    # ---- progress --------------------------------------------------------------------------------------------

    def _reported(self, report: Report) -> None:
        progress, now_s, before = self.progress, self.now(), self.report
        if progress is None or self.key is None:
            return
        self.report = report
        elapsed_s = now_s - self._stepped_s
        if report.step is not None:
            self._stepped_s, self._numbers_steps = now_s, True
        # What stands still in an engine that numbers its steps proves nothing: its metrics outlive its steps.
        if _counts(report) != _counts(before) or (report.running and not self._numbers_steps):
            self.last_sign_s = now_s
        self._compare_counts()
        if self.prefixes is not None:
            if report.prefix_queries:
                self.prefixes.looked_up(report.prefix_hits or 0)
            elif report.prefix_hit_tokens is not None:
                self.prefixes.reported(report.prefix_hit_tokens)
        if report.joules is not None:
            self.accounting.measured(report)
        elif report.prompt_tokens:
            self.accounting.processed_prompts(report.prompt_tokens)
        assert self._emit is not None
        for event in progress.report(report, elapsed_s=elapsed_s):
            self._emit(event)
        self._arm()

    def _compare_counts(self) -> None:
        """Note since when the engine has reported fewer requests than it should hold."""
        report = self.report
        if report is None or report.running + report.waiting >= self.in_flight:
            self.lacking_s = None
        elif self.lacking_s is None:
            self.lacking_s = self.now()

    def _arm(self) -> None:
        """Advance iterations by a timer while neither reports nor streams show them."""
        if self._timer is None and self.progress is not None and self.progress.needs_timer:
            self._timer = asyncio.get_running_loop().call_later(self._step_s(), self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self.progress is None or self.key is None:
            return
        assert self._emit is not None
        try:
            for event in self.progress.tick():
                self._emit(event)
        except Exception:  # the timer must go on after it
            log.exception("the iterations of engine %s were not advanced this time", self.name)
        self._arm()

    def _step_s(self) -> float:
        """The predicted time of one iteration."""
        estimate, clock = self.accounting.at_maximum, self.accounting.reading().clock_mhz
        if estimate is None or clock not in estimate.table.clocks_mhz:
            return _UNKNOWN_STEP_S
        return max(_SHORTEST_STEP_S, estimate.table.at(clock, self.in_flight, 1, 0)[0])


def _counts(report: Report | None) -> tuple[int | None, ...]:
    """What moves while an engine works."""
    return () if report is None else (report.step, report.running, report.waiting, report.kv_blocks)
