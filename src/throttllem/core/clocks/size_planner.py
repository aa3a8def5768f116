"""Which engine size next, by energy and risk (`least-energy+autoscale`).

The paper's rule (`sizing`) takes the smallest size that covers the measured rate. This one takes the size that costs
least over the time in which a change pays for itself, among those that hold the load. Knows nothing of engines: it
returns a size, the controller does the shadow instancing.
"""

# The theory.
#
# Risk. A larger engine is up only `startup_s` after it was asked for. Until then requests beyond the rate that the size
# holds queue up, and every request that comes waits for those before it. At its maximum load 99 of 100 requests meet
# their SLO (that is how `cost_curve` defines it); with an exponential tail of what they take, a wait of the fraction
# u of the SLO makes (100^u - 1) / 99 of them late. A size is enough if on the mean over the rates that may come
# (`rate_forecast`), and over the time until then, at most 1 - attainment of the requests are late. Where the present
# size is not enough, the cheapest larger one that is takes over at once; the largest, if none is.
#
# Energy. A size costs P*(rate) watts (`cost_curve`). A change costs joules: the new engine starts, and the old one
# drains: its last request ends alone. Whether the rate will stay long enough to pay for that is not known. This is the
# ski-rental problem: rent on (keep the size) or buy (change it). The rule that never costs more than twice what
# hindsight would have cost is to change once the watts forgone so far add up to the cost of the change: the load is
# taken to last as long again as it has lasted. They are added up for each size that is enough, and begin again from
# nothing when it is not, or when it costs more for as long as it saved. A change to a smaller size is taken to be
# followed by the change back, so both count. This replaces the paper's grace period and headroom.
#
# Time of day. Where the profile of the day is known, a change must also pay within the time for which the size will be
# enough by the profile.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from throttllem.core.clocks.cost_curve import CostCurve, Limits, cost_curve
from throttllem.core.clocks.rate_forecast import SLOTS, RateForecast
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.clocks.steady_load import Load
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec

_LEAST_LEAD_S = 30.0  # the least time for which a size must be enough
_CURVE_S = 600.0  # a curve is drawn again after this time,
_DRIFT = 0.05  # or once the mean request has changed by this fraction
_RECENT = 512  # requests whose attainment is asked for
_NO_SLO_SLACK_S = 60.0
_MOMENTS = 5  # of the time until another engine could be up, at which lateness is evaluated
_LN_100 = math.log(100.0)
_AHEAD_S = 7200.0  # the farthest that the profile is looked ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """The curve of a size, when and for which mean request (prompt and output tokens) it was drawn."""

    curve: CostCurve
    at_s: float
    prompt_tokens: float
    output_tokens: float


@dataclass(slots=True, kw_only=True)
class SizePlanner:
    """Forecasts the rate, prices the sizes, and selects the one to run.

    `priced` by size. `forgone_j`: joules that the present size cost more than each other one since that was last not
    worth it or not enough. `planned_s`: when it was last asked. `may_be_late`: fraction of the recent requests that
    their SLO classes allow to be late.
    """

    options: AutoscaleOptions
    forecast: RateForecast
    priced: dict[int, Priced] = field(default_factory=dict)
    forgone_j: dict[int, float] = field(default_factory=dict)
    planned_s: float | None = None
    may_be_late: float | None = None

    def arrived(self, now_s: float, attainment: float, sequences: int = 1) -> None:
        """Count one request that an engine can hold by the `sequences` that it runs, with the attainment that its SLO
        class asks for. O(1) amortised.
        """
        self.forecast.arrived(now_s, sequences)
        allowed, before = 1.0 - attainment, self.may_be_late
        self.may_be_late = allowed if before is None else before + (allowed - before) / _RECENT

    def changed(self) -> None:
        """A change of size was completed: what others would have cost is counted from now on."""
        self.forgone_j.clear()

    def wanted(self, now_s: float, current_tp: int, demand: Demand, sizes: Sizes) -> int:
        """The size to run from now on; `current_tp` while nothing is to be done. To be called every interval."""
        load, passed_s = demand.load, self.prepare(now_s, demand, sizes)
        if load is None or passed_s is None or self.may_be_late is None:
            return current_tp
        rate = self.forecast.rate_rps()
        enough = [tp for tp in sorted(sizes.specs) if self._late(tp, demand) <= self.may_be_late]
        watts = {tp: self.priced[tp].curve.watts_at(rate) for tp in sizes.specs}
        if current_tp not in enough:
            larger = [tp for tp in enough if tp > current_tp]
            return min(larger, key=watts.__getitem__, default=max(sizes.specs))
        best, best_j = current_tp, 0.0
        for tp in sizes.specs:
            if tp == current_tp or tp not in enough:
                self.forgone_j[tp] = 0.0
                continue
            saved_w = watts[current_tp] - watts[tp]
            self.forgone_j[tp] = max(0.0, self.forgone_j.get(tp, 0.0) + saved_w * passed_s)
            cost_j = sizes.change_j(current_tp, tp, load)
            if tp < current_tp:
                cost_j += sizes.change_j(tp, current_tp, load)
            net_j = self.forgone_j[tp] - cost_j
            if net_j > best_j and self._pays(current_tp, tp, cost_j):
                best, best_j = tp, net_j
        return best

    def prepare(self, now_s: float, demand: Demand, sizes: Sizes) -> float | None:
        """Forecast the rate and price the sizes. Returns seconds since the last time; None as long as the load or the
        curve of a size is not known.
        """
        self.forecast.advance(now_s)
        passed_s = 0.0 if self.planned_s is None else now_s - self.planned_s
        self.planned_s = now_s
        if demand.load is None or self.may_be_late is None:
            return None
        return passed_s if self._price(now_s, demand.load, demand, sizes) else None

    def _late(self, tp: int, demand: Demand) -> float:
        return self.late(self.priced[tp].curve.holds_rps, demand, slack_s=demand.slack_s)

    def late(self, holds_rps: float, demand: Demand, *, slack_s: float) -> float:
        """Expected share of the coming requests that are late if engines that hold so much serve them, where a wait of
        `slack_s` makes all of them late.
        """
        rates = self.forecast.coming_rps()
        if not rates.any() and not demand.waiting:
            return 0.0
        if not holds_rps:
            return 1.0
        lead_s = self.forecast.lead * self.forecast.interval_s
        last_s = (demand.waiting + (rates - holds_rps) * lead_s) / holds_rps
        waits_s = np.linspace(demand.waiting / holds_rps, last_s, _MOMENTS)
        late = np.expm1(_LN_100 * np.clip(waits_s / slack_s, 0.0, 1.0)) / 99.0
        return float((late.mean(axis=0) * rates).sum() / rates.sum()) if rates.any() else float(late[0].max())

    def _pays(self, current_tp: int, tp: int, cost_j: float) -> bool:
        """Whether the change pays before the profile ends it; True where there is no profile."""
        ahead, slot_s = self.ahead_rps(), self.slot_s
        if ahead is None:
            return True
        now, then = self.priced[current_tp].curve, self.priced[tp].curve
        held = takewhile(lambda rate: rate <= then.holds_rps, ahead)
        return sum((now.watts_at(rate) - then.watts_at(rate)) * slot_s for rate in held) > cost_j

    @property
    def slot_s(self) -> float:
        """The length of a slot of the profile of the day."""
        return self.options.day_s / SLOTS

    def ahead_rps(self) -> list[float] | None:
        """The rates of the next slots, as far as they are looked ahead; None where there is no profile."""
        return self.forecast.ahead_rps(max(1, round(min(_AHEAD_S / self.slot_s, SLOTS / 4))))

    def _price(self, now_s: float, load: Load, demand: Demand, sizes: Sizes) -> bool:
        """Draw the oldest curve that does not hold any more, one at a time. True once there is one of every size."""
        stale = [tp for tp in sizes.specs if self._is_stale(tp, now_s, load)]
        for tp in stale if len(self.priced) < len(sizes.specs) else stale[:1]:
            capacity_rps = self.options.capacity_rps.get(tp, 0.0)
            curve = cost_curve(load, sizes.tables[tp], sizes.specs[tp], demand.limits, capacity_rps=capacity_rps)
            self.priced[tp] = Priced(
                curve=curve, at_s=now_s, prompt_tokens=load.prompt_tokens, output_tokens=load.output_tokens
            )
        return len(self.priced) == len(sizes.specs)

    def _is_stale(self, tp: int, now_s: float, load: Load) -> bool:
        priced = self.priced.get(tp)
        if priced is None or now_s - priced.at_s >= _CURVE_S:
            return True
        return any(
            abs(math.log(now / then)) > _DRIFT
            for now, then in (
                (load.prompt_tokens, priced.prompt_tokens),
                (load.output_tokens, priced.output_tokens),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What clients want at one moment: the load (None: not known yet), the SLOs that bind besides its E2E SLO, and how
    many requests wait for an engine.
    """

    load: Load | None
    limits: Limits
    waiting: int

    @property
    def slack_s(self) -> float:
        """The tightest E2E or TTFT SLO; without both, a minute."""
        e2e_s = None if self.load is None else self.load.e2e_s
        slack_s = min(self.limits.ttft_s, math.inf if e2e_s is None else e2e_s)
        return slack_s if math.isfinite(slack_s) else _NO_SLO_SLACK_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What could be started: spec and performance table by tensor parallel degree."""

    specs: Mapping[int, EngineSpec]
    tables: Mapping[int, PerformanceTable]

    def change_j(self, from_tp: int, to_tp: int, load: Load) -> float:
        """Joules of a change: one engine starts and the other drains."""
        return self.start_j(to_tp) + self.drain_j(from_tp, load)

    def start_j(self, tp: int) -> float:
        """Joules of a start, in which an engine draws about what it does idle."""
        return self.specs[tp].idle_w * self.specs[tp].startup_s

    def drain_j(self, tp: int, load: Load) -> float:
        """Joules of the last request of an engine, which ends alone."""
        table, spec = self.tables[tp], self.specs[tp]
        blocks = round((load.prompt_tokens + load.output_tokens / 2) / spec.block_tokens)
        cell = table.cell(1, blocks, 0)
        return float((table.seconds[cell] * table.watts[cell]).min()) * load.output_tokens


def size_planner(options: AutoscaleOptions, specs: Mapping[int, EngineSpec], *, offset_s: float) -> SizePlanner:
    """A planner that has seen nothing yet; `offset_s` is the time of day at the driver's time 0."""
    lead_s = max(_LEAST_LEAD_S, options.interval_s + max(spec.startup_s for spec in specs.values()))
    forecast = RateForecast(
        interval_s=options.interval_s,
        lead=math.ceil(lead_s / options.interval_s),
        day_s=options.day_s,
        offset_s=offset_s,
    )
    return SizePlanner(options=options, forecast=forecast)
