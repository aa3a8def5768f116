"""Events in, commands out: one controller over all engines of one model (aioquic's shape; the paper's section on the
system). It owns the queue, one scoreboard per engine and the clock each should run at. It never reads a clock: time is
an argument, and `next_deadline` says when it wants a `Timer`. The order of work after any event is always the same:
book what happened, let the queue's head in while it fits, then plan the clock of every engine that changed. All of it
can be pickled, in mid-run too.
"""

from __future__ import annotations

import math

from throttllem.core.clocks.controller import Governor
from throttllem.core.clocks.sizing import Autoscaler
from throttllem.core.clocks.steady_load import LoadEstimator
from throttllem.core.engine_state import Engines, EngineState, Phase
from throttllem.core.forecast.projection import Projection
from throttllem.core.lengths.expectation import LengthPrediction
from throttllem.core.options import ControllerOptions
from throttllem.core.scheduler import AdmissionQueue, Changed
from throttllem.core.snapshot import Snapshot, view
from throttllem.core.state_update import StateUpdate
from throttllem.core.types import (
    Arrived,
    Cancel,
    Cancelled,
    ClockRead,
    Command,
    EngineLost,
    EngineReady,
    EngineSpec,
    Event,
    Fail,
    Observed,
    Progressed,
    Reason,
    Request,
    StartEngine,
    Stepped,
    StopEngine,
    Timer,
)


class Controller:
    """The control core. `handle` is its only way in; all its state is a function of the events so far."""

    def __init__(self, options: ControllerOptions) -> None:
        self.options = options
        self._engines = Engines(options.specs if options.autoscale else {}, options.tables)
        self._load = LoadEstimator(options.load_window_s)
        self._foresight = LengthPrediction(options.predictor, options.inflation)
        self._booking = StateUpdate(self._load, self._foresight)
        self._governor = Governor(options.throttle, self._load)
        self._entrance = AdmissionQueue(options, self._engines, self._governor, self._foresight, self._booking)
        self._autoscaler = Autoscaler(options.autoscale) if options.autoscale else None
        self._autoscale_at_s: float | None = None

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take one event in; what to do about it, in order. `now_s` never goes back."""
        commands, changed = self.take_in(event, now_s)
        return commands + self.settle(changed, now_s)

    def take_in(self, event: Event, now_s: float) -> tuple[list[Command], Changed]:
        """The first half of `handle`: what happened is booked, and who may come in does. `settle` must come next."""
        commands: list[Command] = []
        changed: Changed = {}
        match event:
            case Stepped() | Progressed() | Observed():
                engine = self._engines.get(event.engine)
                if engine is None or not self._book(engine, event, now_s):
                    return commands, changed
                changed[engine.engine] = engine
            case Arrived(request=request):
                self._arrived(request, now_s, commands)
            case Cancelled(request_id=request_id):
                changed = self._cancelled(request_id, commands)
            case EngineReady(engine=key, spec=spec):
                changed = self._ready(key, spec, now_s)
            case EngineLost(engine=key):
                changed = self._engine_lost(key, now_s, commands)
            case ClockRead():
                changed = self._clock_read(event, now_s)
            case Timer():
                changed = {state.engine: state for state in self._engines if state.again_at_s <= now_s}
        changed |= self._autoscale(now_s, commands)
        self._entrance.give_up(now_s, commands, changed)
        self._entrance.let_in(now_s, commands, changed)
        return commands, changed

    def settle(self, changed: Changed, now_s: float) -> list[Command]:
        """The second half, at the same time: the clocks of all engines that changed are planned."""
        commands: list[Command] = []
        for engine in changed.values():
            self._settle(engine, now_s, commands)
        return commands

    def next_deadline(self) -> float | None:
        """When the controller wants a `Timer` at the latest; None: only events matter."""
        again_s = min((engine.again_at_s for engine in self._engines), default=math.inf)
        if self._autoscale_at_s is not None:
            again_s = min(again_s, self._autoscale_at_s)
        again_s = min(again_s, self._entrance.give_up_s())
        return again_s if again_s < math.inf else None

    def projection(self, engine: int) -> Projection | None:
        """The projection that the clock of an engine rests on; None for policies that do not project."""
        state = self._engines.get(engine)
        return state.projection if state else None

    def serving(self) -> int | None:
        """The engine that takes new requests."""
        return self._engines.serving.engine if self._engines.serving else None

    def kv_blocks(self, engine: int) -> int:
        """The scoreboard's estimate of the KV blocks in use. O(1)."""
        state = self._engines.get(engine)
        return 0 if state is None else state.board.kv_blocks(state.told)

    def snapshot(self) -> Snapshot:
        """All that others may know, frozen. O(engines)."""
        views = tuple(view(state) for state in self._engines)
        return Snapshot(
            queue=len(self._entrance),
            head=self._entrance.head,
            engines=views,
            counts=self._booking.counts,
            lengths=self._foresight.score,
        )

    def _book(self, engine: EngineState, event: Stepped | Progressed | Observed, now_s: float) -> bool:
        """Book what an engine told; True if it calls for a new plan."""
        if engine.spec is None:
            return False
        match event:
            case Stepped():
                return self._booking.stepped(engine, event, now_s)
            case Progressed():
                return self._booking.progressed(engine, event, now_s)
            case Observed():
                return self._booking.observed(engine, event)

    def _arrived(self, request: Request, now_s: float, commands: list[Command]) -> None:
        self._booking.count(arrived=1)
        row = self._entrance.arrived(request, commands)
        if self._autoscaler:
            self._autoscaler.arrived(now_s, 1 if row is None else request.sequences)
            if self._autoscale_at_s is None:
                self._autoscale_at_s = now_s + self._autoscaler.options.interval_s
        if row is not None:
            tokens, sequences = row.predicted_tokens, request.sequences
            self._load.arrived(now_s, request.prompt_tokens, tokens, request.slo, sequences)

    def _cancelled(self, request_id: int, commands: list[Command]) -> Changed:
        for engine in self._engines:
            if request_id in engine.board:
                self._foresight.dropped(engine.board.remove(request_id))
                engine.in_progress = engine.in_progress and len(engine.board) > 0
                self._booking.count(failed=1)
                commands.append(Cancel(engine=engine.engine, request_id=request_id))
                return {engine.engine: engine}
        self._entrance.cancelled(request_id, commands)
        return {}

    def _ready(self, key: int, spec: EngineSpec, now_s: float) -> Changed:
        engine = self._engines.ready(key, spec)
        return {} if engine is None else self._serve(engine, now_s)

    def _engine_lost(self, key: int, now_s: float, commands: list[Command]) -> Changed:
        """What ran is gone; one that drains serves again, or else another is started unless one starts already."""
        engine = self._engines.remove(key)
        if engine is None:
            return {}
        for row in engine.board.rows():
            self._foresight.dropped(row)
            self._booking.count(failed=1)
            commands.append(Fail(request_id=row.request.id, why=Reason.ENGINE_LOST))
        if self._engines.serving is None and (draining := self._engines.draining()):
            return self._serve(draining, now_s)
        if not len(self._engines):
            self._start(engine.tp, commands)
        return {}

    def _clock_read(self, read: ClockRead, now_s: float) -> Changed:
        """An unknown clock is asked for again, at the top; so is one that did not follow, unless something holds it
        down: then every higher clock is planned as what it comes to.
        """
        engine = self._engines.get(read.engine)
        if engine is None:
            return {}
        engine.clock_mhz = read.mhz
        before = engine.table
        engine.table = before and before.capped(read.limit_mhz)
        under_way = now_s < engine.set_at_s + self.options.throttle.switch_latency_s
        held = read.limit_mhz is not None and (read.mhz or 0) <= (engine.target_mhz or 0)
        if read.mhz is None or (read.mhz != engine.target_mhz and not under_way and not held):
            engine.target_mhz = None  # whatever was asked for is not what is: the next plan is asked for anew
            return {engine.engine: engine}
        return {} if engine.table is before else {engine.engine: engine}

    def _settle(self, engine: EngineState, now_s: float, commands: list[Command]) -> None:
        """Plan the clock of an engine that changed; one that has drained is stopped."""
        if engine.spec is None:
            return
        if engine.phase is Phase.DRAINING and not len(engine.board):
            self._engines.remove(engine.engine)
            commands.append(StopEngine(engine=engine.engine))
            return
        engine.others = engine.board.others
        waiting = len(self._entrance) > 0 and engine.phase is Phase.SERVING
        command = self._governor.settle(engine, now_s, waiting=waiting)
        if command:
            commands.append(command)
        if not engine.in_progress and len(engine.board):
            engine.in_progress, engine.began_s = True, now_s

    def _autoscale(self, now_s: float, commands: list[Command]) -> Changed:
        """Every interval: bring up the size that the load calls for, or go back to one that drains still."""
        serving = self._engines.serving
        if self._autoscaler is None or self._autoscale_at_s is None or now_s < self._autoscale_at_s:
            return {}
        self._autoscale_at_s = now_s + self._autoscaler.options.interval_s
        if serving is None or any(state.phase is Phase.STARTING for state in self._engines):
            return {}
        wanted = max(self._autoscaler.wanted(now_s, serving.tp), self._entrance.least_size())
        if wanted == serving.tp:
            return {}
        draining = [state for state in self._engines if state.tp == wanted]
        if draining:
            return self._serve(draining[0], now_s)
        self._start(wanted, commands)
        return {}

    def _serve(self, engine: EngineState, now_s: float) -> Changed:
        before = self._engines.serve(engine)
        if before is not None and self._autoscaler:
            self._autoscaler.changed(now_s)
        return {state.engine: state for state in (engine, before) if state}

    def _start(self, tp: int, commands: list[Command]) -> None:
        commands.append(StartEngine(engine=self._engines.start(tp).engine, tp=tp))
