"""What an engine size costs at each request rate: P*(rate), the least mean watts at which it holds the load.

A pure function of the load's lengths and SLOs, the performance table and the spec. Knows nothing of time, nor of the
size that runs now.
"""

# Every rate is priced by `steady_load.steady`, at its cheapest clock among those that hold the load. Lengths and SLOs
# are those of the present load; only the rate varies, and with it how far bursts go above the mean (relative bursts of
# independent requests shrink with the square root of the rate). Between two rates the curve is straight, and it ends at
# the idle watts.

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from throttllem.core.clocks.steady_load import Load, steady
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec

_SHARES = (0.03, 0.05, 0.08, 0.13, 0.2, 0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Rates at which a curve is evaluated, as shares of the maximum load; closer where it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCurve:
    """Least mean watts of one engine size (`watts`) at each of the `rates_rps`, ascending from 0.

    `holds_rps`: the highest rate that the size holds; 0 if it holds none. Beyond it the curve goes on straight, as what
    serving that rate would cost if it could be served.
    """

    rates_rps: tuple[float, ...]
    watts: tuple[float, ...]
    holds_rps: float

    def watts_at(self, rate_rps: float) -> float:
        """Mean watts of the size at a rate; its idle watts if it holds none."""
        beyond = rate_rps / self.holds_rps if self.holds_rps else 1.0
        return float(np.interp(rate_rps, self.rates_rps, self.watts)) * max(1.0, beyond)


def cost_curve(
    load: Load, table: PerformanceTable, spec: EngineSpec, *, capacity_rps: float, reserve: float
) -> CostCurve:
    """The curve of a size whose characterised maximum load is `capacity_rps`, for requests like those of `load`.

    `reserve` as in `steady`: the fraction of its E2E SLO that a long output must leave.
    """
    rates = [capacity_rps * share for share in _SHARES]
    least = [float(steady(_at(load, rate), table, spec, reserve=reserve).watts.min()) for rate in rates]
    held = [(rate, watts) for rate, watts in zip(rates, least, strict=True) if math.isfinite(watts)]
    rates_rps, watts = zip((0.0, spec.idle_w), *held, strict=True)
    return CostCurve(rates_rps=rates_rps, watts=watts, holds_rps=rates_rps[-1])


def _at(load: Load, rate_rps: float) -> Load:
    """The same requests at another rate."""
    span_s = load.e2e_s or 1.0
    before, after = max(load.requests_per_s * span_s, 1.0), max(rate_rps * span_s, 1.0)
    return replace(load, requests_per_s=rate_rps, burst=1.0 + (load.burst - 1.0) * math.sqrt(before / after))
