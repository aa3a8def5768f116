"""Events in, commands out: one controller over all engines of one model (aioquic's shape; the paper's section on the
system). It owns the queue, one scoreboard per engine and the clock each should run at. It never reads a clock: time is
an argument, and `next_deadline` says when it wants a `Timer`. The order of work after any event is always the same:
book what happened, let the queue's head in while it fits, then plan the clock of every engine that changed.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from throttllem.core.admission import ADMIT, admit, never_fits
from throttllem.core.autoscale import Autoscaler
from throttllem.core.engines import Engines, EngineState, Phase
from throttllem.core.governor import Governor
from throttllem.core.length import predicted_tokens
from throttllem.core.load import LoadEstimator
from throttllem.core.options import ControllerOptions
from throttllem.core.projection import Projection
from throttllem.core.scoreboard import Row
from throttllem.core.snapshot import Counts, Snapshot, view
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
    Reason,
    Reject,
    Request,
    StartEngine,
    Stepped,
    StopEngine,
    Timer,
    Verdict,
    VerdictKind,
)

Changed = dict[int, EngineState]


class Controller:
    """The control core. `handle` is its only way in; all its state is a function of the events so far."""

    def __init__(self, options: ControllerOptions) -> None:
        self.options = options
        self._queue: deque[Row] = deque()
        self._head: Verdict | None = None
        self._engines = Engines(options.specs if options.autoscale else {}, options.tables)
        self._load = LoadEstimator(options.load_window_s)
        self._governor = Governor(options.throttle, self._load)
        self._autoscaler = Autoscaler(options.autoscale) if options.autoscale else None
        self._autoscale_at_s: float | None = None
        self._counts = Counts()

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take one event in; what to do about it, in order. `now_s` never goes back."""
        commands: list[Command] = []
        changed: Changed = {}
        match event:
            case Stepped():
                stepped = self._stepped(event, now_s)
                if stepped is None:
                    return commands
                changed = stepped
            case Arrived(request=request):
                self._arrived(request, now_s, commands)
            case Cancelled(request_id=request_id):
                changed = self._cancelled(request_id, commands)
            case EngineReady(engine=key, spec=spec):
                changed = self._ready(key, spec, now_s)
            case EngineLost(engine=key):
                changed = self._engine_lost(key, now_s, commands)
            case ClockRead(engine=key, mhz=mhz):
                changed = self._clock_read(key, mhz, now_s)
            case Timer():
                changed = {state.engine: state for state in self._engines if state.again_at_s <= now_s}
        changed |= self._autoscale(now_s, commands)
        self._let_in(now_s, commands, changed)
        for engine in changed.values():
            self._settle(engine, now_s, commands)
        return commands

    def next_deadline(self) -> float | None:
        """When the controller wants a `Timer` at the latest; None: only events matter."""
        again_s = min((engine.again_at_s for engine in self._engines), default=math.inf)
        if self._autoscale_at_s is not None:
            again_s = min(again_s, self._autoscale_at_s)
        return again_s if again_s < math.inf else None

    def projection(self, engine: int) -> Projection | None:
        """The projection that the clock of an engine rests on; None for policies that do not project."""
        state = self._engines.get(engine)
        return state.projection if state else None

    def serving(self) -> int | None:
        """The engine that takes new requests."""
        return self._engines.serving.engine if self._engines.serving else None

    def snapshot(self) -> Snapshot:
        """All that others may know, frozen. O(engines)."""
        views = tuple(view(state) for state in self._engines)
        return Snapshot(queue=len(self._queue), head=self._head, engines=views, counts=self._counts)

    def _stepped(self, event: Stepped, now_s: float) -> Changed | None:
        """Book an iteration; None if nothing changed but the iteration's number. O(1) then."""
        engine = self._engines.get(event.engine)
        if engine is None or engine.spec is None:
            return None
        engine.iteration, engine.began_s = event.iteration + 1, now_s
        board = engine.board
        for request_id in event.preempted:
            if request_id in board.running:
                board.preempt(request_id, event.iteration)
        for request_id in event.started:
            if request_id in board.pending:
                board.begin(request_id, event.iteration, now_s)
        for request_id in event.finished:
            if request_id in board:
                row = board.remove(request_id)
                self._count(finished=1, lost=row.lost)
                self._load.finished(row.predicted_tokens, row.generated_tokens(event.iteration))
        outgrown = board.outgrown(engine.iteration)
        if not (event.started or event.finished or event.preempted or outgrown):
            engine.in_progress = len(board) > 0
            return None
        engine.in_progress = False
        return {engine.engine: engine}

    def _arrived(self, request: Request, now_s: float, commands: list[Command]) -> None:
        self._count(arrived=1)
        if self._autoscaler:
            self._autoscaler.arrived(now_s)
            if self._autoscale_at_s is None:
                self._autoscale_at_s = now_s + self._autoscaler.options.interval_s
        reasons = [never_fits(request, spec) for spec in self._engines.specs()]
        why = reasons[-1] if reasons and all(reasons) else None
        if why is None and len(self._queue) >= self.options.admission.queue_limit:
            why = Reason.QUEUE_FULL
        if why is not None:
            self._reject(request.id, why, commands)
            return
        tokens = predicted_tokens(self.options.predictor, request, self.options.inflation)
        sure_tokens = math.ceil(tokens / max(1.0, self.options.inflation))
        self._load.arrived(now_s, request.prompt_tokens, tokens, request.slo)
        self._queue.append(Row(request=request, predicted_tokens=tokens, answer_tokens=tokens, sure_tokens=sure_tokens))

    def _cancelled(self, request_id: int, commands: list[Command]) -> Changed:
        for engine in self._engines:
            if request_id in engine.board:
                engine.board.remove(request_id)
                engine.in_progress = engine.in_progress and len(engine.board) > 0
                self._count(failed=1)
                commands.append(Cancel(engine=engine.engine, request_id=request_id))
                return {engine.engine: engine}
        for row in self._queue:
            if row.request.id == request_id:
                self._queue.remove(row)
                self._reject(request_id, Reason.CANCELLED, commands)
                break
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
            self._count(failed=1)
            commands.append(Fail(request_id=row.request.id, why=Reason.ENGINE_LOST))
        if self._engines.serving is None and (draining := self._engines.draining()):
            return self._serve(draining, now_s)
        if not len(self._engines):
            self._start(engine.tp, commands)
        return {}

    def _clock_read(self, key: int, mhz: int | None, now_s: float) -> Changed:
        """An unknown clock is asked for again, at the top; one that did not follow is planned and asked for again."""
        engine = self._engines.get(key)
        if engine is None:
            return {}
        engine.clock_mhz = mhz
        under_way = now_s < engine.set_at_s + self.options.throttle.switch_latency_s
        if mhz is None or (mhz != engine.target_mhz and not under_way):
            engine.target_mhz = None  # whatever was asked for is not what is: the next plan is asked for anew
            return {key: engine}
        return {}

    def _let_in(self, now_s: float, commands: list[Command], changed: Changed) -> None:
        """Dispatch the queue's head while it may join; a request never overtakes another."""
        self._head = None
        engine = self._engines.serving
        while self._queue:
            if engine is None or engine.spec is None:
                self._head = Verdict(kind=VerdictKind.WAIT, why=Reason.NO_ENGINE)
                return
            row = self._queue[0]
            row.earliest = engine.iteration + engine.in_progress
            verdict = self._verdict(engine, engine.spec, row, now_s)
            changed[engine.engine] = engine
            if verdict.kind is VerdictKind.WAIT:
                self._head = verdict
                return
            self._queue.popleft()
            if verdict.kind is VerdictKind.REJECT:
                self._reject(row.request.id, verdict.why, commands)
                continue
            row.lost = verdict.kind is VerdictKind.LOST
            engine.board.dispatch(row)
            self._count(dispatched=1)
            commands.append(Dispatch(engine=engine.engine, request_id=row.request.id))

    def _verdict(self, engine: EngineState, spec: EngineSpec, row: Row, now_s: float) -> Verdict:
        why = never_fits(row.request, spec)
        if why is not None:  # on this engine; if a larger one can hold it, the autoscaler will bring that up
            larger = any(never_fits(row.request, other) is None for other in self._engines.specs())
            return Verdict(kind=VerdictKind.WAIT if larger else VerdictKind.REJECT, why=why)
        if not self.options.slo_aware:
            return ADMIT
        if engine.table is None:
            full = len(engine.board) >= spec.max_batch
            return Verdict(kind=VerdictKind.WAIT, why=Reason.BATCH) if full else ADMIT
        return admit(
            engine.board,
            spec,
            engine.table,
            row,
            first=engine.iteration,
            base_s=engine.base_s(now_s),
            delay_s=self._governor.top_delay_s(engine, now_s),
            margin=self.options.admission.margin,
            patient=self.options.admission.is_patient(row.request, now_s),
        )

    def _settle(self, engine: EngineState, now_s: float, commands: list[Command]) -> None:
        """Plan the clock of an engine that changed; one that has drained is stopped."""
        if engine.spec is None:
            return
        if engine.phase is Phase.DRAINING and not len(engine.board):
            self._engines.remove(engine.engine)
            commands.append(StopEngine(engine=engine.engine))
            return
        waiting = bool(self._queue) and engine.phase is Phase.SERVING
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
        wanted = max(self._autoscaler.wanted(now_s, serving.tp), self._least_size())
        if wanted == serving.tp:
            return {}
        draining = [state for state in self._engines if state.tp == wanted]
        if draining:
            return self._serve(draining[0], now_s)
        self._start(wanted, commands)
        return {}

    def _least_size(self) -> int:
        """The smallest size that the queue's head fits on, so that it cannot starve."""
        if not self._queue:
            return 0
        head = self._queue[0].request
        return min((tp for tp, spec in self.options.specs.items() if never_fits(head, spec) is None), default=0)

    def _serve(self, engine: EngineState, now_s: float) -> Changed:
        before = self._engines.serve(engine)
        if before is not None and self._autoscaler:
            self._autoscaler.changed(now_s)
        return {state.engine: state for state in (engine, before) if state}

    def _start(self, tp: int, commands: list[Command]) -> None:
        commands.append(StartEngine(engine=self._engines.start(tp).engine, tp=tp))

    def _reject(self, request_id: int, why: Reason, commands: list[Command]) -> None:
        self._count(rejected=1)
        commands.append(Reject(request_id=request_id, why=why))

    def _count(self, **more: int) -> None:
        counts = self._counts
        self._counts = replace(counts, **{name: getattr(counts, name) + by for name, by in more.items()})
