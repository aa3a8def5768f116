"""What an engine size costs at each request rate: P*(rate), the least mean watts at which it holds the load.

A pure function of the load's lengths and SLOs, the performance table and the spec. Knows nothing of time, nor of the
size that runs now.
"""

# Each rate is priced as `least-energy` would run it: by the pace of least mean power over the number of requests in
# flight (`request_chain`), with the price on requests in flight that a long output needs to meet its E2E SLO. Lengths
# and SLOs are those of the present load; only the rate varies.
#
# A rate is held if a long output (99th percentile) is in time at the fastest pace, and, under a TTFT SLO, if at most
# one request in a hundred finds the engine full; and up to the load that `characterize` found, whatever outputs of the
# present do: the 99th percentile of a few hundred is noise. Congestion is part of the chain: its mean number of
# requests grows without bound towards the engine's throughput. How far a rate swings is not: the forecast's part.

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from throttllem.core.clocks.request_chain import Chain, chain, least_energy_pace, open_clocks
from throttllem.core.clocks.steady_load import Load
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec

_SHARES = (0.02, 0.05, 0.1, 0.17, 0.25, 0.35, 0.45, 0.55, 0.65, 0.73, 0.8, 0.86, 0.91, 0.95)
"""Rates at which a curve is evaluated, as shares of the engine's throughput; closer where congestion begins."""
_CLOCKS = 20
"""Where more clocks are profiled, about this many of them are tried."""
_MOST_FULL = 0.01
"""Under a TTFT SLO: the fraction of requests that may find the engine full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCurve:
    """Least mean watts of one engine size (`watts`) at each of the `rates_rps`, ascending from 0.

    `holds_rps`: the highest rate that the size holds; 0 if it holds none. Beyond the last rate watts are proportional.
    """

    rates_rps: tuple[float, ...]
    watts: tuple[float, ...]
    holds_rps: float

    def watts_at(self, rate_rps: float) -> float:
        """Mean watts of the size at a rate; its idle watts if it has room for no two requests."""
        beyond = rate_rps / self.rates_rps[-1] if self.rates_rps[-1] else 1.0
        return float(np.interp(rate_rps, self.rates_rps, self.watts)) * max(1.0, beyond)

    def watts_of(self, rates_rps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The same at many rates."""
        beyond = rates_rps / self.rates_rps[-1] if self.rates_rps[-1] else np.ones_like(rates_rps)
        return np.interp(rates_rps, self.rates_rps, self.watts) * np.maximum(1.0, beyond)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The SLOs that bind a curve, seconds (inf: none), besides the load's own E2E SLO; and `reserve`, the fraction of
    the E2E SLO that a long output must leave.
    """

    tbt_s: float
    ttft_s: float
    reserve: float


def cost_curve(
    load: Load, table: PerformanceTable, spec: EngineSpec, limits: Limits, *, capacity_rps: float = 0.0
) -> CostCurve:
    """The curve of a size for requests like those of `load`. `capacity_rps`: its characterised maximum load; it holds
    that at least.
    """
    states = _thinned(chain(load, table, spec))
    if states is None:
        return CostCurve(rates_rps=(0.0,), watts=(spec.idle_w,), holds_rps=0.0)
    rates = [share * float(states.leave_per_s[-1].max()) for share in _SHARES]
    watts, held = zip(
        *(_priced(replace(load, requests_per_s=rate), states, spec, limits) for rate in rates), strict=True
    )
    first = held.index(False) if False in held else len(held)
    return CostCurve(
        rates_rps=(0.0, *rates),
        watts=(spec.idle_w, *watts),
        holds_rps=max(rates[first - 1] if first else 0.0, capacity_rps),
    )


def _thinned(states: Chain | None) -> Chain | None:
    """The same engine with fewer clocks, the maximum among them: the least watts hardly change."""
    if states is None:
        return None
    clocks = states.watts.shape[1]
    every = max(1, clocks // _CLOCKS)
    columns = slice((clocks - 1) % every, None, every)
    return Chain(
        kv_blocks=states.kv_blocks,
        leave_per_s=np.ascontiguousarray(states.leave_per_s[:, columns]),
        watts=np.ascontiguousarray(states.watts[:, columns]),
        prompt_s=np.ascontiguousarray(states.prompt_s[:, columns]),
        step_s=np.ascontiguousarray(states.step_s[:, columns]),
    )


def _priced(load: Load, states: Chain, spec: EngineSpec, limits: Limits) -> tuple[float, bool]:
    """Mean watts at the load's rate, and whether the size holds it."""
    rate = load.requests_per_s
    pace = least_energy_pace(load, states, open_clocks(load, states, limits.tbt_s), spec, reserve=limits.reserve)
    token_s = (pace.mean_requests / rate - pace.prompt_s) / load.output_tokens
    whole_s = pace.prompt_s + load.long_output_tokens * token_s
    rows = np.arange(pace.column.size)
    ratios = rate / states.leave_per_s[rows, pace.column]
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
    likely = np.exp(logs - logs.max())
    likely[-1] /= 1.0 - ratios[-1]  # and all beyond, a geometric tail
    likely /= likely.sum()
    watts = float(likely @ np.concatenate([[spec.idle_w], states.watts[rows, pace.column]]))
    late = token_s > limits.tbt_s or (load.e2e_s is not None and whole_s > load.e2e_s)
    full = math.isfinite(limits.ttft_s) and likely[-1] > _MOST_FULL
    return watts, not (late or full)
