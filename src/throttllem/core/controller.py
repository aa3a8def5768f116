"""Events in, commands out: one controller over all engines of one model (the shape of aioquic's connection).

`handle` updates the state and admits requests; clocks are planned at the next `Timer`, which is needed at once after an
event that calls for a plan (`next_deadline`). So a request is on its way before clocks are planned, and events that
come together share one plan. Time is an argument. Knows nothing of wall clocks, sockets or GPUs.
"""

from __future__ import annotations

import math
from dataclasses import asdict

from throttllem.core.admission import GATHERED, AdmissionQueue, refused_by_all
from throttllem.core.clocks.controller import ClockController
from throttllem.core.clocks.cost_curve import Limits
from throttllem.core.clocks.gathering import Gathering, fills, left_tokens
from throttllem.core.clocks.own_policy import OwnClock, OwnPolicy
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.clocks.size_planner import Demand, SizePlanner, Sizes, size_planner
from throttllem.core.clocks.sizing import Autoscaler
from throttllem.core.clocks.steady_load import LoadEstimator
from throttllem.core.engine_state import EngineState, Phase
from throttllem.core.forecast.margins import EndedRequest, Margins
from throttllem.core.forecast.projection import Projection
from throttllem.core.lengths.prediction import LengthScore
from throttllem.core.options import ControllerOptions
from throttllem.core.pool.engines import Engines
from throttllem.core.pool.planner import PoolPlanner
from throttllem.core.pool.pool import Pool
from throttllem.core.scoreboard import SequenceState
from throttllem.core.snapshot import Counts, Snapshot, view
from throttllem.core.state import ControllerState
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
    Request,
    ShuttingDown,
    StartEngine,
    Stepped,
    StopEngine,
    Timer,
    Uncontrolled,
    VerdictKind,
)

_WHATEVER_THE_LOAD = (Reason.FIXED, Reason.NO_TABLE)
"""Plans that requests which come and go do not change."""


class PlanningError(Exception):
    """No clock could be planned for `engine`: what the core knows of it is in doubt. Others keep their turn."""

    def __init__(self, engine: int) -> None:
        super().__init__(f"no clock could be planned for engine {engine}")
        self.engine = engine


class Controller:
    """The control core. `handle` is its only way in; all its state is a function of the events so far.

    `own` chooses clocks in place of the policy of `options`; a controller that has one cannot be recorded.
    """

    def __init__(self, options: ControllerOptions, own: OwnPolicy | None = None) -> None:
        self.options = options
        capacity_rps = {} if options.autoscale is None else options.autoscale.capacity_rps
        self._engines = Engines(
            options.startable,
            options.tables,
            weights=None if options.pool is None else capacity_rps,
            load_window_s=options.load_window_s,
        )
        self._pool: Pool | None = None
        if options.pool is not None:
            pool = options.pool
            due_s = math.inf if pool.start_s is None else -math.inf
            self._pool = Pool(gpus=pool.gpus, target=dict(pool.engines), start_s=pool.start_s, due_s=due_s)
        self._load = LoadEstimator(window_s=options.load_window_s)
        self._predictor = options.predictor
        self._length_score = LengthScore()
        # The paper's policy has fixed margins.
        learns = options.throttle.policy is ClockPolicy.LEAST_ENERGY
        self._margins = Margins(clocks=learns, admission=options.slo_aware and options.admission.rejects)
        self._queue = AdmissionQueue(options, self._margins)
        self._gathering = Gathering(window_s=options.load_window_s)
        self._clocks = ClockController(options.throttle, self._load, self._margins)
        self._configured_switch_s = options.throttle.switch_latency_s
        self._own = OwnClock(policy=own, switch_latency_s=self._configured_switch_s) if own is not None else None
        self._autoscaler: Autoscaler | None = None
        self._size_planner: SizePlanner | None = None
        self._pool_planner: PoolPlanner | None = None
        if options.autoscale and options.sized_by_energy:
            planner = size_planner(options.autoscale, options.specs, offset_s=options.day_offset_s)
            if options.pool is None:
                self._size_planner = planner
            else:
                self._pool_planner = PoolPlanner(sizes=planner)
        elif options.autoscale:
            self._autoscaler = Autoscaler(options=options.autoscale)
        self._counts = asdict(Counts())
        self._unplanned: dict[int, EngineState] = {}
        self._unplanned_since_s = 0.0
        self._idle: list[EngineState] = []
        """Engines of which it is not known when an iteration began, and which may have work now."""
        self._resize_s = math.inf

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take in one event; the commands that follow from it, in order. `now_s` never goes back.

        If it leaves an engine without a plan, `next_deadline` is `now_s`: the driver must pass a `Timer` next, or after
        other events of the same moment. Raises PlanningError at a `Timer` if the state of an engine makes no sense.
        """
        commands: list[Command] = []
        changed = True
        match event:
            case Stepped():
                changed = self._stepped(event, now_s)
            case Observed():
                changed = self._observed(event)
            case RateChanged():
                changed = self._rate_changed(event)
            case Uncontrolled():
                changed = self._uncontrolled(event)
            case Progressed():
                changed = self._progressed(event, now_s)
            case Timer() if self._unplanned:
                self._plan(now_s, commands)
                changed = False
            case Timer() if now_s >= self._engines.due_s:
                self._mark_due(now_s)
            case Arrived(request=request, again=True):
                self._came_back(request, commands)
            case Arrived(request=request):
                self._arrived(request, now_s, commands)
            case Cancelled(request_id=request_id):
                self._cancelled(request_id, commands)
            case EngineReady(engine=key, spec=spec):
                self._ready(key, spec, now_s, commands)
            case EngineLost(engine=key):
                self._engine_lost(key, now_s, commands)
            case ClockRead():
                self._clock_read(event, now_s)
            case ShuttingDown():
                self._gathering.closing = True
        if changed:
            if now_s >= self._resize_s:
                self._resize(now_s, commands)
            if self._pool is not None and now_s >= self._pool.due_s:
                self._change_pool(self._pool, now_s, commands)
            self._admit(now_s, commands)
            for state in self._idle:
                if state.began_s is None and (state.board.running or state.board.pending):
                    state.began_s = now_s
            self._idle.clear()
            self._unplanned_since_s = now_s
        return commands

    def next_deadline(self) -> float | None:
        """When the controller needs a `Timer` at the latest; None: only events matter. O(1)."""
        if self._unplanned:
            return self._unplanned_since_s
        deadline_s = min(self._engines.due_s, self._resize_s)
        if self._pool is not None:
            deadline_s = min(deadline_s, self._pool.due_s)
        if self._engines.timed:  # without a table it is not known what is too late
            deadline_s = min(deadline_s, self._queue.next_expiry_s, self._queue.release_s)
        return deadline_s if deadline_s < math.inf else None

    def projection(self, engine: int) -> Projection | None:
        """The projection that the clock of an engine rests on; None for policies that do not project."""
        state = self._engines.by_id.get(engine)
        return state.projection if state else None

    def serving(self) -> int | None:
        """The engine that takes new requests; of several the one that has served longest."""
        return next(iter(self._engines.serving), None)

    def serves_alone(self) -> bool:
        """Whether exactly one engine takes new requests. O(1)."""
        return self._engines.sole is not None

    def serves(self, engine: int) -> bool:
        """Whether the engine takes new requests. O(1)."""
        return engine in self._engines.serving

    def unchanged_until(self, engine: int) -> float:
        """The first iteration at which a sequence of the engine may have outgrown its prediction (inf: none will).

        Until then one `Stepped` may stand for several iterations in which no request started, finished or was
        preempted, if no other event came in between. O(1).
        """
        state = self._engines.by_id.get(engine)
        return math.inf if state is None else 0 if state.stale else state.board.next_end

    def waiting(self) -> int:
        """Requests in the queue, held ones too. O(1)."""
        return len(self._queue.waiting) + len(self._queue.held)

    def kv_blocks(self, engine: int) -> int:
        """KV blocks that the scoreboard expects in the engine's last iteration; 0 for an engine that is unknown."""
        state = self._engines.by_id.get(engine)
        return state.board.kv_blocks(state.iteration - 1) if state else 0

    def external_sequences(self, engine: int) -> int:
        """Sequences of other clients in the engine, as far as they are known. O(1)."""
        state = self._engines.by_id.get(engine)
        return max(0, state.board.external.batch) if state else 0

    def snapshot(self) -> Snapshot:
        """What telemetry may know, frozen. O(engines)."""
        return Snapshot(
            queue=self.waiting(),
            held=len(self._queue.held),
            hold=self._gathering.plan,
            head=self._queue.head,
            engines=tuple(view(state, self._configured_switch_s) for state in self._engines.by_id.values()),
            counts=Counts(**self._counts),
            lengths=self._length_score,
            attainment=self._margins.view(),
        )

    def state(self) -> ControllerState:
        """All that it knows besides its options; its own parts, to be read before the next event."""
        return ControllerState(
            engines=tuple(self._engines.by_id.values()),
            serving=tuple(self._engines.serving),
            next_engine=self._engines.next_id,
            waiting=tuple(self._queue.waiting.values()),
            head=self._queue.head,
            held=tuple(self._queue.held.values()),
            gathering=self._gathering,
            load=self._load,
            autoscaler=self._autoscaler,
            size_planner=self._size_planner,
            pool_planner=self._pool_planner,
            pool=self._pool,
            counts=Counts(**self._counts),
            lengths=self._length_score,
            margins=self._margins,
            unplanned=tuple(self._unplanned),
            unplanned_since_s=self._unplanned_since_s,
            resize_s=self._resize_s,
        )

    @classmethod
    def from_state(cls, options: ControllerOptions, state: ControllerState) -> Controller:
        """A controller that continues from `state`, and takes its parts over."""
        made = cls(options)
        made._engines.restore(state.engines, state.serving, state.next_engine)
        made._load, made._margins = state.load, state.margins
        made._autoscaler, made._size_planner = state.autoscaler, state.size_planner
        made._pool, made._pool_planner = state.pool, state.pool_planner
        made._queue = AdmissionQueue(options, state.margins)
        made._queue.restore(state.waiting, state.head, state.held)
        made._gathering = state.gathering
        made._clocks = ClockController(options.throttle, state.load, state.margins)
        made._counts = asdict(state.counts)
        made._length_score = state.lengths
        made._unplanned.update((key, made._engines.by_id[key]) for key in state.unplanned)
        made._unplanned_since_s, made._resize_s = state.unplanned_since_s, state.resize_s
        return made

    # ---- engines report --------------------------------------------------------------------------------------

    def _stepped(self, event: Stepped, now_s: float) -> bool:
        """An iteration is over. False if nothing changed but its number: O(1), and nothing to decide."""
        state = self._engines.by_id.get(event.engine)
        if state is None or state.spec is None:
            return False
        board, iteration = state.board, event.iteration + 1
        state.iteration = iteration
        if event.assumed:
            state.table_drift.span = None
        changed = state.stale or bool(event.started or event.finished or event.preempted)
        if changed:
            self._apply(state, event, now_s)
        if board.next_end <= iteration and board.outgrown(iteration, self._predictor.renew):
            changed = True
        if not changed:
            state.began_s = now_s if board.running or board.pending else None
            return False
        state.began_s, state.stale = None, False
        self._idle.append(state)
        self._load_changed(state)
        return True

    def _apply(self, state: EngineState, event: Stepped, now_s: float) -> None:
        """Sequences that the engine preempted, started and finished in an iteration."""
        board, iteration = state.board, event.iteration
        for request_id in event.preempted:
            if request_id in board.running:
                board.preempt(request_id, iteration)
        for request_id in event.started:
            if request_id in board.pending:
                board.begin(request_id, iteration, now_s)
                if self._own is not None:
                    self._own.started(board.running[request_id], now_s)
        for request_id in event.finished:
            if request_id in board:
                sequence = board.remove(request_id)
                del self._engines.by_request[request_id]
                self._engines.router.changed(state)
                tokens = sequence.generated_tokens(iteration)
                self._counts["finished"] += 1
                self._counts["lost"] += sequence.lost
                self._load.finished(request_id, sequence.predicted_tokens, tokens)
                if state.load is not None:
                    state.load.finished(request_id, sequence.predicted_tokens, tokens)
                if self._own is not None:
                    self._own.finished(sequence, tokens, now_s)
                if self._gathering.slos:
                    self._gathering.finished(tokens)
                self._learn(sequence, tokens)
                self._judge(state, sequence, tokens, now_s)

    def _learn(self, sequence: SequenceState, tokens: int) -> None:
        """An output ended with `tokens`; from one of which none were reported there is nothing to learn."""
        if tokens < 1:
            self._predictor.forget(sequence.request)
            return
        predicted, expected = sequence.predicted_tokens, sequence.expected_tokens
        self._length_score = self._length_score.with_output(
            tokens, predicted_tokens=predicted, expected_tokens=predicted if expected is None else expected
        )
        self._predictor.learn(sequence.request, tokens)

    def _judge(self, state: EngineState, sequence: SequenceState, tokens: int, now_s: float) -> None:
        """Count whether a served request met its SLO, and learn margins from it."""
        request, first_s, arrival_s = sequence.request, sequence.first_token_s, sequence.request.arrival_s
        met = request.slo.met(
            e2e_s=now_s - arrival_s,
            ttft_s=None if first_s is None else first_s - arrival_s,
            tbt_s=None if first_s is None else (now_s - first_s) / max(1, tokens - 1),
        )
        if met is None:
            return
        ended = EndedRequest(
            met=met,
            outgrown=tokens > sequence.predicted_tokens,
            disturbed=state.disturbed or state.disturbed_s >= arrival_s,
            slowed=state.slowed or state.slowed_s >= arrival_s,
            in_time=sequence.in_time,
        )
        self._margins.ended(request.slo_class, request.slo.attainment, ended, learns=state.table_drift.followed)

    def _progressed(self, event: Progressed, now_s: float) -> bool:
        """Correct one sequence. True if it began; if it only moved, the next iteration is soon enough to plan."""
        state = self._engines.by_id.get(event.engine)
        if state is None or state.spec is None or event.request_id not in state.board:
            return False
        board = state.board
        begins = event.request_id in board.pending
        sequence = board.pending[event.request_id] if begins else board.running[event.request_id]
        tokens = max(1, min(event.tokens, sequence.request.max_tokens))  # more than it may give is an error of counting
        board.correct(event.request_id, tokens, state.iteration - 1, now_s)
        state.drift.corrections += 1
        if begins:
            self._load_changed(state)
        else:
            state.stale = True
        return begins

    def _observed(self, event: Observed) -> bool:
        """What the engine reports of itself. True if its external load has changed enough since the last plan."""
        state = self._engines.by_id.get(event.engine)
        if state is None or state.spec is None:
            return False
        board = state.board
        board.external = state.drift.compare(event, board.own(state.iteration - 1))
        if not board.external.moved(state.planned_external, state.spec.kv_blocks):
            return False
        state.drift.corrections += 1
        state.planned_external = board.external
        self._engines.router.changed(state)
        self._load_changed(state)
        return True

    def _rate_changed(self, event: RateChanged) -> bool:
        """Iterations of an engine that speculates take another part of a step than was planned."""
        state = self._engines.by_id.get(event.engine)
        if state is None or state.table is None:
            return False
        state.table = state.table.at_rate(event.tokens_per_step)
        state.table_drift.span, state.steady_at_s = None, -math.inf
        self._load_changed(state)
        return True

    def _uncontrolled(self, event: Uncontrolled) -> bool:
        """Requests without control came or went. True if the engine has some now, or no longer."""
        state = self._engines.by_id.get(event.engine)
        if state is None or state.spec is None:
            return False
        before, state.uncontrolled = state.uncontrolled, event.requests
        if bool(before) is bool(event.requests):
            return False
        self._unplanned[state.engine] = state
        return True

    def _clock_read(self, read: ClockRead, now_s: float) -> None:
        """An unknown clock is set again, to the maximum; so is one that did not follow, unless something holds it
        down: then every higher clock is planned as what it comes to.
        """
        state = self._engines.by_id.get(read.engine)
        if state is None:
            return
        state.clock_mhz, state.table_drift.followed = read.mhz, read.followed
        state.table_drift.span = None
        before = state.table
        state.table = before and before.capped(read.limit_mhz)
        if read.switch_s is not None and read.mhz is not None and read.followed and state.spec is not None:
            state.switch_latency.took(state.spec.clocks_mhz, read.mhz, read.switch_s)
        under_way = now_s < state.set_at_s + self._longest_switch_s(state)
        held = read.limit_mhz is not None and (read.mhz or 0) <= (state.target_mhz or 0)
        if read.mhz is None or (read.mhz != state.target_mhz and not under_way and not held):
            state.target_mhz = None  # the target is not in force: the next plan sets its clock again
            self._unplanned[state.engine] = state
        elif state.table is not before:
            self._unplanned[state.engine] = state

    def _longest_switch_s(self, state: EngineState) -> float:
        """When a clock that is not the target has to be set again: never sooner than was configured."""
        configured_s = self._configured_switch_s
        if state.spec is None or state.target_mhz is None:
            return configured_s
        return max(configured_s, state.switch_latency.to_s(state.spec.clocks_mhz, state.target_mhz, configured_s))

    # ---- requests come and go --------------------------------------------------------------------------------

    def _arrived(self, request: Request, now_s: float, commands: list[Command]) -> None:
        self._counts["arrived"] += 1
        why = refused_by_all(request, self._engines.specs)
        if why is None and len(self._queue.waiting) + len(self._queue.held) >= self.options.admission.queue_limit:
            why = Reason.QUEUE_FULL
        if self._autoscaler:
            self._autoscaler.arrived(now_s, 1 if why else request.sequences)
        planner = self._size_planner or (self._pool_planner and self._pool_planner.sizes)
        if planner and why in (None, Reason.QUEUE_FULL):
            planner.arrived(now_s, request.slo.attainment, request.sequences)
        if self.options.autoscale and self._resize_s == math.inf:
            self._resize_s = now_s + self.options.autoscale.interval_s
        if why is not None:
            self._reject(request.id, why, commands)
            return
        if self._own is not None:
            self._own.arrived(request, now_s)
        sequence = SequenceState.planned(request, self._predictor.predict(request), self.options.inflation)
        if (request.slo.batch or self._gathering.slos) and self._may_hold(sequence, now_s):
            self._queue.hold(sequence)
        else:
            self._queue.push(sequence)
        predicted, expected = sequence.predicted_tokens, sequence.expected_tokens
        self._load.arrived(
            request, now_s, predicted_tokens=predicted, expected_tokens=predicted if expected is None else expected
        )

    def _came_back(self, request: Request, commands: list[Command]) -> None:
        """A request that ended on an engine without a byte of its output joins the queue where it would be by its
        arrival. The load has it already, and it had its place in the queue: no limit is checked again.
        """
        self._counts["retried"] += 1
        self._counts["failed"] -= 1
        why = refused_by_all(request, self._engines.specs)
        if why is not None:
            self._reject(request.id, why, commands)
            return
        sequence = SequenceState.planned(request, self._predictor.predict(request), self.options.inflation)
        self._queue.push_back(sequence)

    def _may_hold(self, sequence: SequenceState, now_s: float) -> bool:
        """Whether a request that has just come is held, and its `hold_until_s`: only with least energy, the policy that
        the hold is planned for, and by the table of the one engine that serves.
        """
        self._gathering.arrived(sequence, now_s)
        serving, admission = self._engines.sole, self.options.admission
        least = self.options.throttle.policy is ClockPolicy.LEAST_ENERGY
        if not (sequence.request.slo.batch and least and serving and serving.table):
            return False
        known = self._margins.of_clocks(
            (sequence.request.slo_class,), margin=self.options.throttle.margin, reserve=0.0, disturbed=False
        )
        margin = max(admission.margin_in_force, known.margin)
        self._gathering.renew(serving, now_s, most_s=admission.hold_s, margin=margin)
        sequence.hold_until_s = self._gathering.hold_until_s(sequence, margin=margin)
        return sequence.hold_until_s > now_s

    def _cancelled(self, request_id: int, commands: list[Command]) -> None:
        sequence = self._queue.take(request_id)
        if sequence is not None:
            self._drop(sequence, Reason.CANCELLED, commands)
            return
        state = self._engines.by_request.pop(request_id, None)
        if state is None:
            return
        self._predictor.forget(state.board.remove(request_id).request)
        self._engines.router.changed(state)
        self._load.dropped(request_id)
        if state.load is not None:
            state.load.dropped(request_id)
        if not len(state.board):
            state.began_s = None
        self._counts["failed"] += 1
        commands.append(Cancel(engine=state.engine, request_id=request_id))
        self._load_changed(state)

    def _admit(self, now_s: float, commands: list[Command]) -> None:
        """Take requests out of the queue: those that expired, and those that may join an engine that serves. Held
        requests that are released by that follow.
        """
        if self._queue.next_expiry_s <= now_s and self._engines.timed:
            for sequence, why in self._queue.expire(now_s):
                self._drop(sequence, why, commands)
            for state in self._engines.serving.values():
                self._load_changed(state)
        if self._queue.held:
            self._release(now_s)
        if not self._queue.waiting:
            self._queue.head = GATHERED if self._queue.held else None
            return
        admitted = self._queue.admit(now_s, self._engines.sole_candidate, self._engines.candidates)
        for state in admitted.asked:
            self._load_changed(state)
        for sequence, state, verdict in admitted.left:
            request = sequence.request
            if verdict.kind is VerdictKind.REJECT:
                self._drop(sequence, verdict.why, commands)
                continue
            self._engines.by_request[request.id] = state
            self._idle.append(state)
            if state.load is not None:
                predicted, expected = sequence.predicted_tokens, sequence.expected_tokens
                expected = predicted if expected is None else expected
                state.load.arrived(request, now_s, predicted_tokens=predicted, expected_tokens=expected)
            self._counts["dispatched"] += 1
            commands.append(Dispatch(engine=state.engine, request_id=request.id))
        if admitted.left and self._queue.held and self._release(now_s):
            self._admit(now_s, commands)

    def _release(self, now_s: float) -> bool:
        """Held requests join the queue: all of them when the hold ends, otherwise those that end before the requests
        that the engine runs already. Returns whether there were any.
        """
        serving, queue = self._engines.sole, self._queue
        ends = now_s >= queue.release_s or self._gathering.in_force(now_s) is None
        if ends or serving is None or serving.table is None or fills(serving, queue.held.values()):
            return queue.release(now_s)
        return len(serving.board) > 0 and queue.release(now_s, remaining_tokens=left_tokens(serving))

    def _drop(self, sequence: SequenceState, why: Reason, commands: list[Command]) -> None:
        self._load.dropped(sequence.request.id)
        self._predictor.forget(sequence.request)
        self._reject(sequence.request.id, why, commands)

    def _reject(self, request_id: int, why: Reason, commands: list[Command]) -> None:
        self._counts["rejected"] += 1
        commands.append(Reject(request_id=request_id, why=why))

    # ---- engines come and go ---------------------------------------------------------------------------------

    def _ready(self, key: int, spec: EngineSpec, now_s: float, commands: list[Command]) -> None:
        state = self._engines.ready(key, spec)
        if state is None:
            return
        self._serve(state, now_s)
        if self._pool is not None:
            self._pool.ready(state)
            self._change_pool(self._pool, now_s, commands)

    def _engine_lost(self, key: int, now_s: float, commands: list[Command]) -> None:
        """What ran is gone; one that drains serves again, or else another is started unless one starts already. In a
        pool others take over, and another is started for it.
        """
        state = self._remove(key, now_s)
        if state is None:
            return
        for sequence in state.board.sequences():
            self._predictor.forget(sequence.request)
            self._load.dropped(sequence.request.id)
            self._counts["failed"] += 1
            commands.append(Fail(request_id=sequence.request.id, why=Reason.ENGINE_LOST))
        if not self._engines.serving and (draining := self._engines.draining()):
            self._serve(draining, now_s)
        if self._pool is not None:
            self._pool.lost(state, self._startup_s(state.tp), now_s)
            self._change_pool(self._pool, now_s, commands)
        elif not self._engines.by_id:
            self._start(state.tp, commands)

    def _resize(self, now_s: float, commands: list[Command]) -> None:
        """Every interval: bring up the size that the load calls for, or go back to one that drains still; in a pool as
        many engines of each size.
        """
        assert self.options.autoscale is not None
        self._resize_s = now_s + self.options.autoscale.interval_s
        if self._pool is not None:
            self._retarget(self._pool, now_s, commands)
            return
        serving, states = self._engines.sole, self._engines.by_id.values()
        if serving is None or any(state.phase is Phase.STARTING for state in states):
            return
        wanted = max(self._wanted_size(serving.tp, now_s), self._queue.least_size())
        if wanted == serving.tp:
            return
        draining = [state for state in states if state.tp == wanted]
        if draining:
            self._serve(draining[0], now_s)
        else:
            self._start(wanted, commands)

    def _wanted_size(self, current_tp: int, now_s: float) -> int:
        """The size that the load calls for, by energy and risk or by the paper's rule."""
        if self._size_planner is None:
            assert self._autoscaler is not None
            return self._autoscaler.wanted(now_s, current_tp)
        return self._size_planner.wanted(now_s, current_tp, self._demand(now_s), self._sizes)

    def _retarget(self, pool: Pool, now_s: float, commands: list[Command]) -> None:
        """Find the engines that the load calls for, by energy and risk or by the paper's rule, with one that can hold
        the first request in the queue.
        """
        if self._pool_planner is None:
            assert self._autoscaler is not None
            target = self._autoscaler.wanted_engines(now_s, pool.target, pool.gpus)
        else:
            assert self.options.pool is not None
            target = self._pool_planner.wanted(
                now_s,
                pool.target,
                self._demand(now_s),
                self._sizes,
                gpus=pool.gpus,
                free_w=self.options.pool.free_w,
            )
        least_tp = self._queue.least_size()
        if least_tp > max(target):
            target = pool.with_one(least_tp, target)
        if target != pool.target:
            pool.target = target
            if self._autoscaler:
                self._autoscaler.changed(now_s)
            self._change_pool(pool, now_s, commands)

    def _demand(self, now_s: float) -> Demand:
        """What clients want now."""
        boards = [state.board for state in self._engines.serving.values()]
        limits = Limits(
            tbt_s=min((board.tightest_tbt_s() for board in boards), default=math.inf),
            ttft_s=self._load.first_token[0],
            reserve=self.options.throttle.reserve,
        )
        return Demand(load=self._load.load(now_s), limits=limits, waiting=len(self._queue.waiting))

    @property
    def _sizes(self) -> Sizes:
        return Sizes(specs=self.options.specs, tables=self.options.tables)

    def _serve(self, state: EngineState, now_s: float) -> None:
        self._unplanned[state.engine] = state
        before = self._engines.serve(state, now_s)
        if before is not None:
            self._unplanned[before.engine] = before
            if self._autoscaler:
                self._autoscaler.changed(now_s)
            if self._size_planner:
                self._size_planner.changed()

    def _change_pool(self, pool: Pool, now_s: float, commands: list[Command]) -> None:
        """Give up starts that have not ended in time, and bring the engines closer to those that are wanted."""
        for key in pool.overdue(now_s):
            state = self._remove(key, now_s)
            assert state is not None
            pool.lost(state, self._startup_s(state.tp), now_s)
            commands.append(StopEngine(engine=key))
        changes = pool.changes(self._engines.by_id.values(), now_s)
        for state in changes.stop:
            self._remove(state.engine, now_s)
            pool.given_up(state)
            commands.append(StopEngine(engine=state.engine))
        for state in changes.serve:
            self._serve(state, now_s)
        for state in changes.drain:
            self._engines.drain(state, now_s)
            self._unplanned[state.engine] = state
        for tp in changes.start:
            pool.started(self._start(tp, commands), self._startup_s(tp), now_s)
        pool.find_due(changes, now_s)

    def _startup_s(self, tp: int) -> float:
        """How long a start of that size should take; 0 where no such engine could be started."""
        return self.options.specs[tp].startup_s if tp in self.options.specs else 0.0

    def _start(self, tp: int, commands: list[Command]) -> int:
        engine = self._engines.start(tp).engine
        commands.append(StartEngine(engine=engine, tp=tp))
        return engine

    def _remove(self, key: int, now_s: float) -> EngineState | None:
        self._unplanned.pop(key, None)
        return self._engines.remove(key, now_s)

    # ---- clocks ----------------------------------------------------------------------------------------------

    def _load_changed(self, state: EngineState) -> None:
        """Plan its clock at the next Timer; a clock that does not depend on the load stays as it was planned."""
        if state.phase is Phase.DRAINING or state.plan is None or state.plan.why not in _WHATEVER_THE_LOAD:
            self._unplanned[state.engine] = state

    def _mark_due(self, now_s: float) -> None:
        """Engines whose plan is old need a new one."""
        for state in self._engines.due(now_s):
            self._unplanned[state.engine] = state

    def _plan(self, now_s: float, commands: list[Command]) -> None:
        """Plan the clocks of the engines that changed; one that has drained is stopped."""
        while self._unplanned:
            state = self._unplanned.pop(next(iter(self._unplanned)))
            if state.spec is None:
                continue
            if state.phase is Phase.DRAINING and not len(state.board):
                self._engines.remove(state.engine, now_s)
                commands.append(StopEngine(engine=state.engine))
                if self._pool is not None:
                    self._change_pool(self._pool, now_s, commands)
                continue
            state.planned_external = state.board.external
            state.note(now_s)
            if self._own is not None:
                asked = self._own.plan(state, self._queue.waiting.values(), now_s)
                self._engines.planned(state)
                commands += [asked] if asked else []
                continue
            waiting = len(self._queue.waiting) if state.phase is Phase.SERVING else 0
            if waiting and state is not self._engines.sole:
                waiting = math.ceil(waiting * self._engines.share(state))
            state.gathers = self._gathering.in_force(now_s) is not None
            try:
                command = self._clocks.plan(state, now_s, waiting=waiting)
            except Exception as error:
                if not commands:
                    raise PlanningError(state.engine) from error
                self._unplanned[state.engine] = state  # again at the next timer: these commands must not be lost
                self._engines.planned(state)
                break
            self._engines.planned(state)
            if command:
                commands.append(command)
