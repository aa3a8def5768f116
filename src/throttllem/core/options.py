"""The options of the controller. Each part is documented where it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.lengths.prediction import LengthPredictor, Oracle
from throttllem.core.pool.pool import PoolOptions
from throttllem.core.types import EngineSpec, OptionError, Request, check


class Unmeetable(StrEnum):
    """What becomes of a request whose own SLO cannot be met: served as lost, or rejected."""

    SERVE = "serve"
    REJECT = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionOptions:
    """Which requests are admitted, where the paper leaves it open. A rejection costs little, while a violated SLO has
    cost its tokens, and time in the queue is taken from the engine (docs/decisions.md has the measurements).
    """

    margin: float = 0.05
    """Fraction of every remaining time budget that admission keeps free for the model's error (0: the paper)."""
    patience: float = 0.2
    """Fraction of its E2E SLO (of its TTFT SLO, if that is shorter) for which a request may wait for the SLOs of
    others; then it joins as soon as KV and batch allow, or a long queue would never drain (infinite: the paper). With
    `least-energy` none waits for that, unless unmeetable requests are rejected."""
    queue_limit: int = 10_000
    """Requests that may wait before more are rejected."""
    unmeetable: Unmeetable = Unmeetable.SERVE
    """What happens to a request that cannot meet its own SLO when it could be admitted, or while it waits: `serve` (the
    paper) or `reject`. A request that was admitted in time is always served. With `reject` no request joins at the cost
    of others: one that has waited for its whole patience is rejected too, and those behind it do not wait for it."""
    hold_s: float = 60.0
    """Longest time for which a request that can wait (`batch = true` in its SLO) is held, to run together with others.
    It is held only as long as its own SLOs allow, and only where the performance table says that it saves energy."""
    reject_margin: float = 0.2
    """`margin` with `unmeetable = "reject"`: the initial one; it is learned from then on (`slo.attainment`)."""
    reject_patience: float = 0.1
    """`patience` with `unmeetable = "reject"`."""

    def __post_init__(self) -> None:
        check("admission", margin=(self.margin, 0, 0.9), patience=(self.patience, 0, math.inf))
        check("admission", reject_margin=(self.reject_margin, 0, 0.9))
        check("admission", reject_patience=(self.reject_patience, 0, math.inf))
        check("admission", queue_limit=(self.queue_limit, 1, math.inf), hold_s=(self.hold_s, 0, 3600))
        if self.unmeetable not in list(Unmeetable):
            known = " or ".join(repr(kind.value) for kind in Unmeetable)
            raise OptionError("admission", "unmeetable", repr(self.unmeetable), f"must be {known}")

    def is_patient(self, request: Request, since_s: float, now_s: float) -> bool:
        """Whether this request, which waits for a place since then, may still be held back for others."""
        return self.rejects or now_s < self.patient_until_s(request, since_s)

    def patient_until_s(self, request: Request, since_s: float) -> float:
        """Until when a request that waits for a place since then may be held back for others; inf: without end."""
        slo = request.slo
        shortest_s = min(slo.e2e_s or math.inf, slo.ttft_s or math.inf)
        patience = self.reject_patience if self.rejects else self.patience
        return math.inf if shortest_s == math.inf else since_s + patience * shortest_s

    @property
    def margin_in_force(self) -> float:
        """The margin for what `unmeetable` is."""
        return self.reject_margin if self.rejects else self.margin

    @property
    def rejects(self) -> bool:
        """Whether a request is rejected rather than served late."""
        return self.unmeetable == Unmeetable.REJECT


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerOptions:
    """All that a controller is configured with. `specs` and `tables` by engine size (tensor parallel degree).

    `slo_aware` False is the baseline: first come first served, no admission control. With a `pool` several engines
    serve at a time, without one a single engine does. `inflation` multiplies every length prediction (open in the
    paper). `load_window_s` is the time constant of the load estimate, `day_offset_s` the time of day at the driver's
    time 0.
    """

    throttle: ThrottleOptions
    slo_aware: bool = True
    admission: AdmissionOptions = field(default_factory=AdmissionOptions)
    autoscale: AutoscaleOptions | None = None
    pool: PoolOptions | None = None
    predictor: LengthPredictor = field(default_factory=Oracle)
    inflation: float = 1.0
    specs: Mapping[int, EngineSpec] = field(default_factory=dict)
    tables: Mapping[int, PerformanceTable] = field(default_factory=dict)
    load_window_s: float = 60.0
    day_offset_s: float = 0.0

    @property
    def startable(self) -> Mapping[int, EngineSpec]:
        """Specs of the engines that may be started, by size."""
        if self.pool is None:
            return self.specs if self.autoscale is not None else {}
        sizes = self.specs if self.autoscale is not None else self.pool.engines
        return {tp: spec for tp, spec in self.specs.items() if tp in sizes and tp <= self.pool.gpus}

    @property
    def sized_by_energy(self) -> bool:
        """Whether engine sizes are chosen by energy and risk: with least energy, where every size has a table."""
        return self.throttle.policy is ClockPolicy.LEAST_ENERGY and set(self.specs) <= set(self.tables)
