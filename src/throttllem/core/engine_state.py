"""What the controller knows of one engine. Knows nothing of other engines, clocks or queues."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from throttllem.core.clocks.hindsight import Hindsight
from throttllem.core.clocks.steady_load import LoadEstimator, Steady
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
    table, which corrects `table`. `switch_latency` is what switches of its clocks took, beginning with its profile's.
    `load` is that of the requests that it was given, None where it is that of all requests.
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
    load: LoadEstimator | None = None
    slowed_s: float = -math.inf
    disturbed_s: float = -math.inf

    def __post_init__(self) -> None:
        if self.spec is not None and self.table is not None and self.spec.clocks_mhz != self.table.clocks_mhz:
            raise ValueError(f"engine {self.engine}: has other clocks than its performance table")

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
