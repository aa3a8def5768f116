"""The engines that the controller knows of: their state, and which of them takes new requests.

At most one engine serves; a new one takes its place when it is ready and the old one drains (the paper's shadow
instancing). Knows nothing of clocks or queues.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from throttllem.core.clocks.steady_load import Steady
from throttllem.core.external_load import DriftMeter, ExternalLoad
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import Projection
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import EngineSpec, FrequencyPlan


class Phase(StrEnum):
    """Where an engine is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(slots=True, kw_only=True)
class EngineState:
    """All that the controller knows of one engine. The controller, its books and its governor are its only writers.

    `iteration` is the one in progress or next to begin, `began_s` when it began. `clock_mhz` is the clock in force as
    far as known, `target_mhz` the one asked for at `set_at_s`. `projection` is the one that the plan rests on.
    `again_at_s`: when the clock should be planned again at the latest. `steady`: what the load of `steady_at_s`
    means if it goes on. `stale`: rows were corrected since the last iteration. `others` are those last planned for.
    """

    engine: int
    tp: int
    phase: Phase = Phase.STARTING
    spec: EngineSpec | None = None
    table: PerformanceTable | None = None
    board: Scoreboard = field(default_factory=lambda: Scoreboard(1))
    iteration: int = 0
    began_s: float = 0.0
    in_progress: bool = False
    clock_mhz: int | None = None
    target_mhz: int | None = None
    set_at_s: float = -math.inf
    plan: FrequencyPlan | None = None
    projection: Projection | None = None
    again_at_s: float = math.inf
    steady: Steady | None = None
    steady_at_s: float = -math.inf
    stale: bool = False
    others: ExternalLoad = field(default_factory=ExternalLoad)
    drift: DriftMeter = field(default_factory=DriftMeter)

    @property
    def told(self) -> int:
        """The iteration told last; -1 before the first."""
        return self.iteration - 1

    def base_s(self, now_s: float) -> float:
        """When the iteration that a projection starts with began, or begins."""
        return self.began_s if self.in_progress else now_s


class Engines:
    """The engines by id. `specs` are those of sizes that could be started, by tensor parallel degree."""

    def __init__(self, specs: Mapping[int, EngineSpec], tables: Mapping[int, PerformanceTable]) -> None:
        self.serving: EngineState | None = None
        self._specs = specs
        self._tables = tables
        self._states: dict[int, EngineState] = {}
        self._next = 0

    def __iter__(self) -> Iterator[EngineState]:
        return iter(self._states.values())

    def __len__(self) -> int:
        return len(self._states)

    def draining(self) -> EngineState | None:
        """The largest engine that drains, if one does."""
        found = [state for state in self if state.phase is Phase.DRAINING]
        return max(found, key=lambda state: state.tp, default=None)

    def get(self, engine: int) -> EngineState | None:
        """The engine of that id, if it is known and up or starting."""
        return self._states.get(engine)

    def specs(self) -> list[EngineSpec]:
        """Engines that a request may end up on: the one that serves, and the sizes that could be started."""
        serving = self.serving.spec if self.serving else None
        return [*([serving] if serving else []), *self._specs.values()]

    def start(self, tp: int) -> EngineState:
        """A new engine under a new id; it is not ready yet."""
        return self._add(self._next, tp)

    def ready(self, engine: int, spec: EngineSpec) -> EngineState | None:
        """An engine can serve, at the top clock of what was profiled; None if that was known. Nothing drains yet."""
        state = self._states.get(engine) or self._add(engine, spec.tp)
        if state.spec is not None:
            return None
        table = self._tables.get(spec.tp)
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
        self.serving = engine
        return before

    def remove(self, engine: int) -> EngineState | None:
        """An engine is gone."""
        state = self._states.pop(engine, None)
        if state is not None and state is self.serving:
            self.serving = None
        return state

    def _add(self, engine: int, tp: int) -> EngineState:
        self._next = max(self._next, engine + 1)
        self._states[engine] = state = EngineState(engine=engine, tp=tp)
        return state
