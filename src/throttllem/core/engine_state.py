"""The engines that the controller knows: their state, and which of them takes new requests.

At most one engine serves; when a new one is ready it takes over, and the old one drains (the paper's shadow
instancing). Knows nothing of clocks or queues.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from throttllem.core.clocks.hindsight import Hindsight
from throttllem.core.clocks.steady_load import Steady
from throttllem.core.external_load import DriftMeter, ExternalLoad
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import Projection
from throttllem.core.forecast.switch_latency import SwitchLatency
from throttllem.core.forecast.table_drift import TableDrift
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import EngineSpec, FrequencyPlan


class Phase(StrEnum):
    """Where an engine is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(slots=True, kw_only=True)
class EngineState:
    """All that the controller knows of one engine. Controller, admission queue and clock controller write it.

    `spec` None: it is not ready; `table` None: no performance table. `iteration` is the one in progress or next to
    begin, `began_s` when it began (None: it has not). `clock_mhz` is the clock in force as far as known, `target_mhz`
    the one set at `set_at_s`. `projection` is the one that the plan rests on. `replan_s`: when the clock should be
    planned again at the latest. `steady`: what the load of `steady_at_s` means if it goes on, and `hindsight` the pace
    that suits its requests; both None: not known yet. `stale`: sequences were corrected since the last iteration.
    `gathers`: requests that can wait are held, so the engine is idle after those that it has. `uncontrolled` requests
    compute in it without control. `planned_external` is the external load that was last planned for.
    `slowed_s` and `disturbed_s`: the last plan at which the engine was `slowed`, or `disturbed` (-inf: none).
    `drift` is the scoreboard's distance from the engine's reports, `table_drift` that of the engine's pace from the
    table, which corrects `table`. `switch_latency` is what switches of its clocks took.
    """

    engine: int
    tp: int
    phase: Phase = Phase.STARTING
    spec: EngineSpec | None = None
    table: PerformanceTable | None = None
    board: Scoreboard = field(default_factory=lambda: Scoreboard(1))
    iteration: int = 0
    began_s: float | None = None
    clock_mhz: int | None = None
    target_mhz: int | None = None
    set_at_s: float = -math.inf
    plan: FrequencyPlan | None = None
    projection: Projection | None = None
    replan_s: float = math.inf
    steady: Steady | None = None
    hindsight: Hindsight | None = None
    steady_at_s: float = -math.inf
    stale: bool = False
    gathers: bool = False
    uncontrolled: int = 0
    planned_external: ExternalLoad = field(default_factory=ExternalLoad)
    drift: DriftMeter = field(default_factory=DriftMeter)
    table_drift: TableDrift = field(default_factory=TableDrift)
    switch_latency: SwitchLatency = field(default_factory=SwitchLatency)
    slowed_s: float = -math.inf
    disturbed_s: float = -math.inf

    @property
    def slowed(self) -> bool:
        """Whether a lower clock than the maximum is in force."""
        return self.spec is not None and self.clock_mhz is not None and self.clock_mhz < self.spec.clocks_mhz[-1]

    @property
    def disturbed(self) -> bool:
        """Whether external load is known, or something limits the clock of its GPUs."""
        held = self.table is not None and self.table.limit_mhz is not None
        return held or self.board.external.batch > 0 or self.uncontrolled > 0

    def note(self, now_s: float) -> None:
        """Note at a plan whether the engine is slowed or disturbed, for the requests that are in it."""
        if self.slowed:
            self.slowed_s = now_s
        if self.disturbed:
            self.disturbed_s = now_s

    def maximum_clock_delay_s(self, now_s: float, configured_s: float) -> float:
        """Seconds until the maximum clock could be in force. `configured_s`: what a switch takes as far as nothing was
        learned.
        """
        assert self.spec is not None
        maximum = self.spec.clocks_mhz[-1]
        if self.clock_mhz == maximum:
            return 0.0
        switch_latency_s = self.switch_latency.to_s(self.spec.clocks_mhz, maximum, configured_s)
        if self.target_mhz == maximum:
            return max(0.0, self.set_at_s + switch_latency_s - now_s)
        return switch_latency_s


class Engines:
    """The engines, `by_id`; `serving` takes new requests. `specs` are those that a request may end up on: the engine
    that serves, and the sizes that could be started.

    `sizes` are the specs of engines that could be started, `tables` performance tables, by tensor parallel degree.
    """

    def __init__(self, sizes: Mapping[int, EngineSpec], tables: Mapping[int, PerformanceTable]) -> None:
        self.by_id: dict[int, EngineState] = {}
        self.serving: EngineState | None = None
        self.next_id = 0
        self.specs = list(sizes.values())
        self._sizes = sizes
        self._tables = tables

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
        return state

    def serve(self, engine: EngineState) -> EngineState | None:
        """New requests go to this engine from now on; the engine that drains instead, if there was one."""
        before = self.serving
        if before is not None:
            before.phase = Phase.DRAINING
        engine.phase = Phase.SERVING
        self._set_serving(engine)
        return before

    def remove(self, engine: int) -> EngineState | None:
        """An engine is gone; None if it was not known."""
        state = self.by_id.pop(engine, None)
        if state is not None and state is self.serving:
            self._set_serving(None)
        return state

    def restore(self, engines: Iterable[EngineState], serving: int | None, next_id: int) -> None:
        """Continue with the engines of another controller."""
        self.by_id.update((state.engine, state) for state in engines)
        self.next_id = next_id
        self._set_serving(None if serving is None else self.by_id[serving])

    def _set_serving(self, engine: EngineState | None) -> None:
        self.serving = engine
        first = [engine.spec] if engine is not None and engine.spec is not None else []
        self.specs = [*first, *self._sizes.values()]

    def _add(self, engine: int, tp: int) -> EngineState:
        self.next_id = max(self.next_id, engine + 1)
        self.by_id[engine] = state = EngineState(engine=engine, tp=tp)
        return state
