"""The engines that the controller knows, which of them take new requests, and where each request runs.

Without a pool at most one serves; when a new one is ready it takes over, and the old one drains (the paper's shadow
instancing). Knows nothing of clocks or queues.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from throttllem.core.admission import never_fits
from throttllem.core.clocks.steady_load import LoadEstimator
from throttllem.core.engine_state import EngineState, Phase
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.switch_latency import SwitchLatency
from throttllem.core.pool.routing import Router
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import EngineSpec, Request


class Engines:
    """The engines, `by_id`; those that are `serving`, in the order in which they began to, take new requests: if it is
    one, it is `sole`, and alone in `sole_candidate`. `specs` are those that a request may end up on: of engines that
    serve, and the sizes that could be started. `timed`: whether it is known what is too late, as an engine that serves
    has a performance table, or none serves. `by_request`: where requests run. `due_s` is the first time at which an
    engine should be planned again (inf: none).

    `sizes` are the specs of engines that could be started, `tables` performance tables, by tensor parallel degree.
    `weights` by size: what share of the load each gets; None: one engine serves at a time. `load_window_s`: time
    constant of the load of each engine of a pool.
    """

    def __init__(
        self,
        sizes: Mapping[int, EngineSpec],
        tables: Mapping[int, PerformanceTable],
        *,
        weights: Mapping[int, float] | None = None,
        load_window_s: float = 60.0,
    ) -> None:
        self.by_id: dict[int, EngineState] = {}
        self.by_request: dict[int, EngineState] = {}
        self.router = Router(weights or {})
        self.serving: Mapping[int, EngineState] = self.router.serving
        self.next_id = 0
        self.sole: EngineState | None = None
        self.sole_candidate: list[EngineState] = []
        self.timed = True
        self.specs = list(sizes.values())
        self.due_s = math.inf
        self._due: list[tuple[float, int]] = []
        self._sizes = sizes
        self._tables = tables
        self._mixed = False
        self._pooled = weights is not None
        self._load_window_s = load_window_s

    def candidates(self, request: Request) -> list[EngineState]:
        """The engines to offer a request to, best first: those that can hold it, if some can."""
        if not self._mixed:
            return self.router.with_prefix(request, self.router.candidates())
        able = self.router.candidates(lambda spec: never_fits(request, spec) is None)
        return self.router.with_prefix(request, able) if able else self.router.candidates()

    def share(self, engine: EngineState) -> float:
        """The share of the load that an engine which serves is to get."""
        return 1.0 if engine is self.sole else self.router.weight_of(engine) / self.router.weight

    def draining(self) -> EngineState | None:
        """The largest engine that drains, if one does."""
        found = [state for state in self.by_id.values() if state.phase is Phase.DRAINING]
        return max(found, key=lambda state: state.tp, default=None)

    def start(self, tp: int) -> EngineState:
        """A new engine under a new id; it is not ready yet."""
        return self._add(self.next_id, tp)

    def ready(self, engine: int, spec: EngineSpec) -> EngineState | None:
        """An engine can serve, at the maximum clock that was profiled; None if that was known. Nothing drains yet."""
        state = self.by_id.get(engine) or self._add(engine, spec.tp)
        if state.spec is not None:
            return None
        table = None if spec.unknown else self._tables.get(spec.tp)
        if table is not None and table.clocks_mhz != spec.clocks_mhz:  # clocks that were never profiled are not used
            spec = replace(spec, clocks_mhz=table.clocks_mhz)
        state.spec, state.table, state.board = spec, table, Scoreboard(spec.block_tokens)
        state.clock_mhz = state.target_mhz = spec.clocks_mhz[-1]
        if table is not None:
            state.switch_latency = SwitchLatency.profiled(spec.clocks_mhz, table.switches)
        return state

    def serve(self, engine: EngineState, now_s: float) -> EngineState | None:
        """New requests go to this engine from now on; the engine that drains instead, if there is one."""
        before = None if self._pooled else self.sole
        if before is not None:
            self.drain(before, now_s)
        if self._pooled:
            self._expect(engine)
        weight = self.router.weight
        engine.phase = Phase.SERVING
        self.router.add(engine)
        self._serving_changed(weight, now_s)
        return before

    def drain(self, engine: EngineState, now_s: float) -> None:
        """No new requests go to this engine."""
        engine.phase = Phase.DRAINING
        weight = self.router.weight
        self.router.remove(engine)
        self._serving_changed(weight, now_s)

    def remove(self, engine: int, now_s: float) -> EngineState | None:
        """An engine is gone; None if it was not known."""
        state = self.by_id.pop(engine, None)
        if state is None:
            return None
        self._forget_due()
        for sequence in state.board.sequences():
            del self.by_request[sequence.request.id]
        if state.engine in self.serving:
            weight = self.router.weight
            self.router.remove(state)
            self._serving_changed(weight, now_s)
        return state

    def restore(self, engines: Iterable[EngineState], serving: Iterable[int], next_id: int) -> None:
        """Continue with the engines of another controller."""
        for state in engines:
            self.by_id[state.engine] = state
            self.by_request.update((sequence.request.id, state) for sequence in state.board.sequences())
            self.planned(state)
        for engine in serving:
            self.router.add(self.by_id[engine])
        self.next_id = next_id
        self._find_specs()

    # ---- when clocks are to be planned again -----------------------------------------------------------------

    def planned(self, engine: EngineState) -> None:
        """Its clock was planned, and will be again at its `replan_s`. O(log engines) amortised."""
        if engine.replan_s < math.inf:
            heapq.heappush(self._due, (engine.replan_s, engine.engine))
        self._forget_due()

    def due(self, now_s: float) -> list[EngineState]:
        """Those whose plan is old now, in the order of their ids; they are not due any more."""
        found: dict[int, EngineState] = {}
        self._forget_due()
        while self.due_s <= now_s:
            _, engine = heapq.heappop(self._due)
            found[engine] = self.by_id[engine]
            found[engine].replan_s = math.inf
            self._forget_due()
        return [found[engine] for engine in sorted(found)]

    def _forget_due(self) -> None:
        """Drop what has been planned again since."""
        due = self._due
        while due and not ((state := self.by_id.get(due[0][1])) and state.replan_s == due[0][0]):
            heapq.heappop(due)
        self.due_s = due[0][0] if due else math.inf

    # ---- what engines of a pool expect -----------------------------------------------------------------------

    def _expect(self, engine: EngineState) -> None:
        """An engine that begins to serve in a pool expects the load of another of its size, and takes its pace."""
        others = [other for other in self.serving.values() if other.tp == engine.tp and other.load is not None]
        if others:
            other = min(others, key=lambda other: other.engine)
            assert other.load is not None
            engine.load = other.load.copied()
            engine.steady, engine.hindsight, engine.steady_at_s = other.steady, other.hindsight, other.steady_at_s
        elif engine.load is None:
            engine.load = LoadEstimator(window_s=self._load_window_s)

    def _serving_changed(self, weight: float, now_s: float) -> None:
        """Others serve now; `weight` did before. What each engine of a pool was given lately is taken to come in the
        share that it has from now on.
        """
        self._find_specs()
        if self._pooled and weight and self.router.weight:
            for engine in self.serving.values():
                if engine.load is not None:
                    engine.load.scale(weight / self.router.weight, now_s)

    def _find_specs(self) -> None:
        serving = list(self.serving.values())
        self.sole = serving[0] if len(serving) == 1 else None
        self.sole_candidate = [] if self.sole is None else [self.sole]
        self.timed = not serving or any(engine.table is not None for engine in serving)
        found = dict.fromkeys(engine.spec for engine in serving if engine.spec is not None)
        self._mixed = len(found) > 1
        self.specs = [*found, *self._sizes.values()]

    def _add(self, engine: int, tp: int) -> EngineState:
        self.next_id = max(self.next_id, engine + 1)
        self.by_id[engine] = state = EngineState(engine=engine, tp=tp)
        return state
