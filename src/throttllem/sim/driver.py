"""The virtual-time driver: feeds a trace to the controller and carries out its commands on simulated engines.

It owns the clock of the simulation; policies are the controller's. Events of equal time are handled in the order in
which they were scheduled, so the same inputs give the same run.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from throttllem.config import FaultOptions, Noise
from throttllem.core.controller import Controller
from throttllem.core.types import (
    Arrived,
    ClockRead,
    Command,
    Dispatch,
    EngineLost,
    EngineReady,
    EngineSpec,
    Event,
    Fail,
    Observed,
    Reject,
    Request,
    SetClock,
    StartEngine,
    Stepped,
    StopEngine,
    Timer,
)
from throttllem.engines.simulated.engine import Physics, SimulatedEngine
from throttllem.sim.hosts import Hosts, Start
from throttllem.sim.recorder import Recorder
from throttllem.sim.shifts import ClockLimit, LoadReport, OtherClient, Pace, Shift, ShiftedPhysics

_END_OF_ITERATION, _CLOCK, _READY, _SHIFT, _FAILED, _HOST_LOST, _HOST_REPAIRED = range(7)


class Watch(Protocol):
    """Observes every event that the core handles, and the commands that follow (flight recorder, tests)."""

    def __call__(self, now_s: float, event: Event, commands: list[Command]) -> None:
        """One call of `Controller.handle`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the simulation can start: spec and physics by engine size, and how long a switch of clocks takes.

    `startup_w` and `freed_w` are watts of one GPU: while its engine starts, and while it belongs to none (None: freed
    GPUs are not counted) out of `gpus`. `faults`: what goes wrong in a pool; None: one engine serves at a time.
    """

    specs: Mapping[int, EngineSpec]
    physics: Mapping[int, Physics]
    switch_latency_s: float
    startup_w: float
    gpus: int
    freed_w: float | None = None
    faults: FaultOptions | None = None
    noise: Noise = field(default_factory=Noise)
    shifts: tuple[Shift, ...] = ()
    """What goes wrong, and when, on the engine that is up at the start."""


@dataclass(slots=True)
class Running:
    """A simulated engine that is up, since when it has been idle (None: an iteration is in progress), and its clock as
    it was set.
    """

    engine: SimulatedEngine
    tp: int
    idle_w: float
    idle_since_s: float | None
    set_mhz: int


class Simulation:
    """One run: a controller, a machine, requests in order of arrival. Call `run` once.

    Afterwards `energy_j` is what all GPUs that count used, `idle_energy_j` the part of it with no request running
    (starting engines and counted freed GPUs included), `preemptions` those of all engines.
    """

    def __init__(
        self, controller: Controller, machine: Machine, recorder: Recorder, *, seed: int, watch: Watch | None = None
    ) -> None:
        self.now_s = 0.0
        self.energy_j = 0.0
        self.idle_energy_j = 0.0
        self.preemptions = 0
        self._controller = controller
        self._machine = machine
        self._recorder = recorder
        self._seed = seed
        self._watch = watch
        self._engines: dict[int, Running] = {}
        self._starting: dict[int, tuple[int, float]] = {}
        self._agenda: list[tuple[float, int, int, int, int]] = []
        self._scheduled = 0
        self._open = 0
        self._arrival_s = 0.0
        self._freed_since_s = 0.0
        self._gpus = 0
        """Of engines that are up or start."""
        self._begun = False
        self._hosts = None if machine.faults is None else Hosts(machine.gpus, machine.faults, seed=seed)
        self._limit_mhz: int | None = None

    def run(self, requests: Iterable[Request], tp: int, progress: Callable[[int], None] = lambda _: None) -> None:
        """Serve all requests, beginning with one engine of size `tp` that is up, and with those that the core wants
        besides it; `progress` gets how many requests arrived.
        """
        upcoming = iter(requests)
        request = next(upcoming, None)
        self._arrival_s = request.arrival_s if request else math.inf
        for number, shift in enumerate(self._machine.shifts):
            self._schedule(shift.at_s, _SHIFT, 0, number)
        self._gpus = tp
        if self._hosts is not None:
            self._hosts.place(0, tp)
            self._schedule_loss(self._hosts)
        self._bring_up(0, tp)
        while self._starting:
            self._take_from_agenda()
        self._begun = True
        arrived = 0
        while request is not None or self._open:
            agenda_s = self._agenda[0][0] if self._agenda else math.inf
            timer_s = self._controller.next_deadline()
            next_s = min(self._arrival_s, agenda_s, math.inf if timer_s is None else timer_s)
            assert next_s < math.inf, "requests are open and no event is to come"
            self.now_s = max(self.now_s, next_s)
            if agenda_s <= self.now_s:
                self._take_from_agenda()
            elif request is not None and self._arrival_s <= self.now_s:
                event = Arrived(request=request)
                self._open += 1
                self._recorder.arrived(request)
                request = next(upcoming, None)
                self._arrival_s = request.arrival_s if request else math.inf
                self._handle(event)
                arrived += 1
                if arrived % 64 == 0:
                    progress(arrived)
            else:
                self._handle(Timer())
        self._shut_down()

    # ---- events ----------------------------------------------------------------------------------------------

    def _schedule(self, at_s: float, kind: int, engine: int, value: int = 0) -> None:
        self._scheduled += 1
        heapq.heappush(self._agenda, (at_s, self._scheduled, kind, engine, value))

    def _take_from_agenda(self) -> None:
        _, _, kind, key, value = heapq.heappop(self._agenda)
        if kind == _END_OF_ITERATION:
            if key in self._engines:  # otherwise it was lost meanwhile
                self._end_iteration(key, self._engines[key])
        elif kind == _READY:
            if key in self._starting:  # otherwise its start was given up
                tp, since_s = self._starting.pop(key)
                self._idle_energy(since_s, self._machine.startup_w * tp)
                self._bring_up(key, tp)
        elif kind == _FAILED:
            if key in self._starting:
                self._lose(key)
        elif kind in (_HOST_LOST, _HOST_REPAIRED):
            self._change_host(value, lost=kind == _HOST_LOST)
        elif key in self._engines and kind == _SHIFT:
            self._shift(key, self._engines[key], self._machine.shifts[value])
        elif key in self._engines:
            self._engines[key].set_mhz = value
            self._follow(key, self._engines[key], switch_s=self._machine.switch_latency_s)

    def _follow(self, key: int, up: Running, *, switch_s: float | None = None) -> None:
        """The GPUs run at the clock that was set, as far as nothing holds them down, after a switch of `switch_s`."""
        mhz = up.set_mhz if self._limit_mhz is None else min(up.set_mhz, self._limit_mhz)
        up.engine.clock_mhz = mhz
        switch_s = switch_s if mhz == up.set_mhz else None
        self._handle(ClockRead(engine=key, mhz=mhz, limit_mhz=self._limit_mhz, switch_s=switch_s))

    def _shift(self, key: int, up: Running, shift: Shift) -> None:
        plain = self._machine.physics[up.tp]
        now = up.engine.physics
        shifted = now if isinstance(now, ShiftedPhysics) else ShiftedPhysics(plain=plain)
        match shift:
            case Pace(factor=factor):
                shifted.pace = factor
            case OtherClient(sequences=sequences, context_tokens=tokens):
                shifted.sequences, shifted.kv_tokens = sequences, sequences * tokens
            case ClockLimit(mhz=mhz):
                self._limit_mhz = mhz
                self._follow(key, up)
            case LoadReport():
                batcher, others = up.engine.batcher, shifted.kv_tokens // up.engine.spec.block_tokens
                self._handle(
                    Observed(
                        engine=key,
                        running=len(batcher) - batcher.waiting + shifted.sequences,
                        waiting=batcher.waiting,
                        kv_blocks=batcher.used_blocks + others,
                    )
                )
        up.engine.physics = plain if shifted.as_plain else shifted

    def _handle(self, event: Event) -> None:
        """Let the core handle an event, and the timer that it makes due at once; carry out the commands, and begin an
        iteration on idle engines that have work now.
        """
        before = perf_counter()
        commands = self._commands(event)
        deadline_s = self._controller.next_deadline()
        if deadline_s is not None and deadline_s <= self.now_s:
            commands = [*commands, *self._commands(Timer())]
        if commands or not isinstance(event, Stepped) or event.started or event.finished:
            self._recorder.decisions_s.add(perf_counter() - before)
        for command in commands:
            self._do(command)
        if commands or isinstance(event, Arrived):
            self._recorder.state(self.now_s, self._controller.waiting(), self._gpus)
        for command in commands:
            if isinstance(command, Dispatch):
                up = self._engines[command.engine]
                if up.idle_since_s is not None:
                    self._end_idle(up)
                    self._begin_iteration(command.engine, up)

    def _commands(self, event: Event) -> list[Command]:
        commands = self._controller.handle(event, self.now_s)
        if self._watch:
            self._watch(self.now_s, event, commands)
        return commands

    def _do(self, command: Command) -> None:
        match command:
            case Dispatch(engine=key, request_id=request_id):
                request = self._recorder.lives[request_id].request
                assert request.output_tokens is not None
                self._engines[key].engine.batcher.add(
                    request_id,
                    prompt_tokens=request.prompt_tokens,
                    output_tokens=request.output_tokens,
                    max_tokens=request.max_tokens,
                )
            case SetClock(engine=key, plan=plan):
                self._recorder.switches += 1
                self._schedule(self.now_s + self._machine.switch_latency_s, _CLOCK, key, plan.mhz)
            case Reject(request_id=request_id, why=why) | Fail(request_id=request_id, why=why):
                self._open -= 1
                self._recorder.rejected(request_id, why)
            case StartEngine(engine=key, tp=tp):
                self._count_freed()
                self._gpus += tp
                self._starting[key] = (tp, self.now_s)
                self._begin_start(key, tp)
            case StopEngine(engine=key):
                self._count_freed()
                self._stop(key)
            case _:
                raise AssertionError(f"no client disconnects, yet {command}")

    # ---- engines ---------------------------------------------------------------------------------------------

    def _begin_start(self, key: int, tp: int) -> None:
        """An engine starts, and is up, fails or hangs; those of the beginning are up at once."""
        startup_s = self._machine.specs[tp].startup_s if self._begun else 0.0
        kind: int | None = _READY
        if self._hosts is not None:
            start = self._hosts.start() if self._begun else Start()
            if not self._hosts.place(key, tp) or start.fails:
                kind = _FAILED
            elif start.hangs:
                kind = None
        if kind is not None:
            self._schedule(self.now_s + startup_s, kind, key)

    def _schedule_loss(self, hosts: Hosts) -> None:
        after_s = hosts.next_loss_s()
        if after_s is not None:
            self._schedule(self.now_s + after_s, _HOST_LOST, 0)

    def _change_host(self, number: int, *, lost: bool) -> None:
        """The next host is lost with its engines, or host `number` is repaired."""
        assert self._hosts is not None and self._machine.faults is not None
        if not lost:
            self._hosts.repaired(number)
            return
        number, engines = self._hosts.lose()
        self._schedule(self.now_s + self._machine.faults.host_repair_s, _HOST_REPAIRED, 0, number)
        self._schedule_loss(self._hosts)
        for key in engines:
            self._lose(key)

    def _lose(self, key: int) -> None:
        """An engine is gone, or its start has failed; the core hears of it."""
        self._count_freed()
        self._stop(key)
        self._handle(EngineLost(engine=key))

    def _bring_up(self, key: int, tp: int) -> None:
        spec, physics = self._machine.specs[tp], self._machine.physics[tp]
        engine = SimulatedEngine(
            spec, physics, clock_mhz=spec.clocks_mhz[-1], seed=(self._seed, key), noise=self._machine.noise
        )
        self._engines[key] = Running(
            engine=engine, tp=tp, idle_w=physics.idle_w(), idle_since_s=self.now_s, set_mhz=engine.clock_mhz
        )
        self._recorder.engine(self.now_s, tp, 1, pooled=self._hosts is not None)
        self._handle(EngineReady(engine=key, spec=spec))

    def _begin_iteration(self, key: int, up: Running) -> None:
        """Begin the engine's next iteration, after those that change nothing: none starts or ends a request, and
        nothing else comes in before the end of the last one. The core hears of that one alone.
        """
        recorder, controller, first = self._recorder, self._controller, up.engine.batcher.iteration
        begun = up.engine.advance(
            self.now_s,
            limit_s=self._quiet_until_s(),
            before=controller.unchanged_until(key),
            steps=recorder.steps,
            filled=recorder.filled,
        )
        if begun is None:
            up.idle_since_s = self.now_s
            return
        projection, serving = controller.projection(key), controller.serves(key)
        recorder.ran(begun.ran + 1, up.engine.clock_mhz, first=first, projection=projection, serving=serving)
        self.now_s = begun.begin_s
        if begun.ran:
            commands = controller.handle(Stepped(engine=key, iteration=first + begun.ran - 1), self.now_s)
            assert not commands, f"nothing changed, yet {commands}"
        for request_id in begun.preempted:
            recorder.preempted(request_id, self.now_s)
        for request_id, _ in begun.prefills:
            recorder.prompt(request_id, self.now_s)
        self._schedule(self.now_s + begun.seconds, _END_OF_ITERATION, key)

    def _quiet_until_s(self) -> float:
        """When the next event comes that is no iteration's end; now, if there are observers or several engines."""
        if self._watch is not None or len(self._engines) > 1:
            return self.now_s
        timer_s = self._controller.next_deadline()
        agenda_s = self._agenda[0][0] if self._agenda else math.inf
        return min(self._arrival_s, agenda_s, math.inf if timer_s is None else timer_s)

    def _end_iteration(self, key: int, up: Running) -> None:
        outcome, energies = up.engine.finish()
        for request_id in outcome.started:
            self._recorder.token(request_id, self.now_s)
        for request_id, energy_j in energies.items():
            self._recorder.ended(request_id, self.now_s, energy_j)
            self._open -= 1
        self._handle(
            Stepped(
                engine=key,
                iteration=outcome.index,
                started=outcome.started,
                finished=outcome.finished,
                preempted=outcome.preempted,
            )
        )
        if key in self._engines:
            self._begin_iteration(key, up)

    def _end_idle(self, up: Running) -> None:
        assert up.idle_since_s is not None
        up.engine.idle(self.now_s - up.idle_since_s)
        self._recorder.idle(up.idle_since_s, self.now_s, up.idle_w)
        up.idle_since_s = None

    def _stop(self, key: int) -> None:
        """An engine, up or starting, has no GPUs any more."""
        if key in self._starting:
            tp, since_s = self._starting.pop(key)
            self._idle_energy(since_s, self._machine.startup_w * tp)
        else:
            up = self._engines.pop(key)
            tp = up.tp
            self._take_down(up)
            self._recorder.engine(self.now_s, tp, -1, pooled=self._hosts is not None)
        self._gpus -= tp
        if self._hosts is not None:
            self._hosts.remove(key)

    def _take_down(self, up: Running) -> None:
        if up.idle_since_s is not None:
            self._end_idle(up)
        self.energy_j += up.engine.ledger.total_j
        self.idle_energy_j += up.engine.ledger.idle_j
        self.preemptions += up.engine.batcher.preemptions

    def _idle_energy(self, since_s: float, watts: float) -> None:
        """Energy outside of any engine that is up: one that starts, GPUs that belong to none."""
        joules = watts * (self.now_s - since_s)
        self.energy_j += joules
        self.idle_energy_j += joules
        self._recorder.idle(since_s, self.now_s, watts)

    def _count_freed(self) -> None:
        """Count the energy of GPUs that belonged to no engine since the last change, if they count."""
        if self._machine.freed_w is not None:
            self._idle_energy(self._freed_since_s, self._machine.freed_w * max(0, self._machine.gpus - self._gpus))
        self._freed_since_s = self.now_s

    def _shut_down(self) -> None:
        self._count_freed()
        for tp, since_s in self._starting.values():
            self._idle_energy(since_s, self._machine.startup_w * tp)
        for up in self._engines.values():
            self._take_down(up)
        self._engines.clear()
