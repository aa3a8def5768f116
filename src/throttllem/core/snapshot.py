"""What the rest of the product may know of the controller: frozen; all that metrics, dashboards and reports read."""

from __future__ import annotations

from dataclasses import dataclass, field

from throttllem.core.clocks.gathering import HoldPlan
from throttllem.core.engine_state import EngineState, Phase
from throttllem.core.external_load import Drift
from throttllem.core.forecast.margins import ClassAttainment
from throttllem.core.forecast.switch_latency import BandLatency
from throttllem.core.forecast.table_drift import BandBias
from throttllem.core.lengths.prediction import LengthScore
from throttllem.core.types import FrequencyPlan, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Requests so far. `lost` are finished ones that could not meet their SLOs; `failed` include cancelled ones.

    Requests that came back from an engine are counted once in all of these but `dispatched`, and in `retried`.
    """

    arrived: int = 0
    dispatched: int = 0
    finished: int = 0
    rejected: int = 0
    failed: int = 0
    lost: int = 0
    retried: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """One engine. `clock_mhz` None: unknown; `plan` None: not planned yet.

    `kv_blocks` is the scoreboard's estimate for the last iteration, `external_sequences` are those of other clients.
    `table_drift`: how far its iterations are from the performance table, by clock band; `beyond_table`: so far that it
    runs at the maximum clock. `switch_latency`: how long switches to a clock take, by the same bands.
    """

    engine: int
    tp: int
    phase: Phase
    clock_mhz: int | None
    plan: FrequencyPlan | None
    running: int
    pending: int
    lost_requests: int
    iteration: int
    kv_blocks: int = 0
    external_sequences: int = 0
    drift: Drift = field(default_factory=Drift)
    table_drift: tuple[BandBias, ...] = ()
    beyond_table: bool = False
    switch_latency: tuple[BandLatency, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The whole controller. `head` is why the first request in the queue waits, None if none does. `held` of the queue
    are requests that can wait, by the plan `hold` (None: none are held).

    `lengths`: how the predictions of finished requests came out. `attainment`: asked and had, by SLO class.
    """

    queue: int
    held: int
    hold: HoldPlan | None
    head: Verdict | None
    engines: tuple[EngineView, ...]
    counts: Counts
    lengths: LengthScore = field(default_factory=LengthScore)
    attainment: tuple[ClassAttainment, ...] = ()


def view(state: EngineState, configured_switch_s: float) -> EngineView:
    """One engine, frozen."""
    clocks_mhz = () if state.spec is None else state.spec.clocks_mhz
    return EngineView(
        engine=state.engine,
        tp=state.tp,
        phase=state.phase,
        clock_mhz=state.clock_mhz,
        plan=state.plan,
        running=len(state.board.running),
        pending=len(state.board.pending),
        lost_requests=state.board.lost_requests,
        iteration=state.iteration,
        kv_blocks=state.board.kv_blocks(state.iteration - 1),
        external_sequences=max(0, state.board.external.batch),
        drift=state.drift.drift(),
        table_drift=state.table_drift.view(state.table),
        beyond_table=state.table_drift.beyond_since_s is not None,
        switch_latency=state.switch_latency.view(clocks_mhz, configured_switch_s),
    )
