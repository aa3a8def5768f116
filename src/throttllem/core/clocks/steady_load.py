"""How much work comes in, and what it would cost to serve it for good at each clock.

The requests at hand say which clocks keep their promises; they cannot say which is cheapest, because more requests
will come. At a given load the engine's throughput is fixed: a lower clock means a larger batch, not less work. So the
cost of a clock is the mean power at which the engine, fed at the measured rate, settles. Knows nothing of deadlines.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec, Slo

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_RECENT = 512
_REFRESH = 32
_LONG = 0.99
_ENOUGH = 32  # finished requests before their lengths are believed more than the predictions
_MEAN_ROWS = np.concatenate([[0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7], 1.15 ** np.arange(0, 48)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load over the recent past: requests per second, tokens of a mean request and of a long answer.

    `burst` is how much above the mean the inflow of tokens goes now and then.
    """

    requests_per_s: float
    prompt_tokens: float
    output_tokens: float
    long_output_tokens: float
    burst: float
    e2e_s: float | None
    """The tightest E2E promise of the recent requests, None if there was none."""


class LoadEstimator:
    """Exponentially weighted arrivals with time constant `window_s`; unbiased from the first second on.

    Long answers and tight promises are looked for among the last `_RECENT` requests. Predictions are inflated on
    purpose; what finished requests say of that is taken out again, or a safe prediction would look like a high load.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._first_s: float | None = None
        self._last_s = 0.0
        self._sums = (0.0, 0.0, 0.0)
        self.first_token: tuple[float, int] = (math.inf, 0)
        """The tightest promise of a first token among recent requests, seconds (inf: none), and their long prompts."""
        self._arrived = 0
        self._recent: deque[tuple[int, float, int, float]] = deque(maxlen=_RECENT)
        self._finished = 0
        self._predicted_tokens = 0.0
        self._answer_tokens = 0.0

    def arrived(self, now_s: float, prompt_tokens: int, output_tokens: int, slo: Slo, sequences: int = 1) -> None:
        """One request came in, with its predicted answer and its promises; `sequences` answers are so many requests."""
        self._recent.append((output_tokens, slo.e2e_s or math.inf, prompt_tokens, slo.ttft_s or math.inf))
        self._arrived += 1
        if self._arrived % _REFRESH == 1:
            prompts_tokens, ttft_s = np.array(self._recent)[:, 2:].T
            self.first_token = (float(ttft_s.min()), math.ceil(np.quantile(prompts_tokens, _LONG)))
        if self._first_s is None:
            self._first_s = self._last_s = now_s
        keep = math.exp(-(now_s - self._last_s) / self._window_s)
        n, prompts, answers = self._sums
        self._sums = (
            n * keep + sequences,
            prompts * keep + sequences * prompt_tokens,
            answers * keep + sequences * output_tokens,
        )
        self._last_s = now_s

    def finished(self, predicted_tokens: int, output_tokens: int) -> None:
        """One request ended with so many tokens."""
        keep = 1.0 - 1.0 / _RECENT
        self._finished += 1
        self._predicted_tokens = keep * self._predicted_tokens + predicted_tokens
        self._answer_tokens = keep * self._answer_tokens + output_tokens

    def load(self, now_s: float) -> Load | None:
        """The load as it stands; None before half a window has been seen."""
        if self._first_s is None or now_s - self._first_s < self._window_s / 2:
            return None
        n, prompts, answers = self._sums
        seen_s = self._window_s * (1.0 - math.exp(-(now_s - self._first_s) / self._window_s))
        keep = math.exp(-(now_s - self._last_s) / self._window_s)
        recent = np.array(self._recent)
        e2e_s, rate = float(recent[:, 1].min()), n * keep / seen_s
        truth = self._answer_tokens / self._predicted_tokens if self._finished >= _ENOUGH else 1.0
        return Load(
            requests_per_s=rate,
            prompt_tokens=prompts / n,
            output_tokens=truth * answers / n,
            long_output_tokens=truth * float(np.quantile(recent[:, 0], _LONG)),
            burst=_burst(recent[:, 0], rate * (e2e_s if math.isfinite(e2e_s) else self._window_s)),
            e2e_s=e2e_s if math.isfinite(e2e_s) else None,
        )


def _burst(output_tokens: Floats, requests: float) -> float:
    """Two standard deviations of a compound Poisson inflow of that many requests, over its mean: (1 + CV^2) / n."""
    variation = float(output_tokens.std() / output_tokens.mean())
    return 1.0 + 2.0 * math.sqrt((1.0 + variation**2) / max(requests, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steady:
    """What a load means if it goes on: mean watts of the engine at each clock, inf where the clock does not hold it,
    and the factor by which prompts that are yet to come stretch every iteration, shape (clocks,) each.
    """

    watts: Floats
    stretch: Floats


def steady(load: Load, table: PerformanceTable, spec: EngineSpec, *, reserve: float) -> Steady:
    """Where the engine settles at each clock if `load` went on for ever.

    A clock holds a load if the load's bursts leave 0.15 of the KV blocks and a tenth of the batch free, and if a long
    answer still comes within the E2E promise less `reserve` of it. Otherwise sprints at high clocks would have to make
    up for it later, and power is convex in the clock: slow and steady is cheaper than slow, then fast.
    """
    burst = _settle(load, load.burst, table, spec)
    mean = _settle(load, 1.0, table, spec)
    held = burst.held
    if load.e2e_s is not None:
        held = held & (load.long_output_tokens * burst.pace_s <= load.e2e_s * (1.0 - reserve))
    return Steady(watts=np.where(held, mean.watts, np.inf), stretch=mean.stretch)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Settled:
    """Mean watts, seconds between two tokens of a row, stretch by prompts, and whether there is such a point at all."""

    watts: Floats
    pace_s: Floats
    stretch: Floats
    held: Bools


def _settle(load: Load, times: float, table: PerformanceTable, spec: EngineSpec) -> _Settled:
    """Where the engine settles at each clock under `times` the load.

    Arrivals are Poisson and every request finds a place, so with m rows on the mean the engine is idle e^-m of the time
    (M/G/infinity) and holds b = m / (1 - e^-m) rows while busy. m solves m = (tokens per second) x t(b), with t the
    seconds of an iteration including its share of prefill.
    """
    rate = load.requests_per_s * times
    rows = _MEAN_ROWS[0.9 * spec.max_batch > _MEAN_ROWS]
    batch = np.maximum(np.round(rows / -np.expm1(-rows)), 1).astype(np.int64)
    kv = np.round(batch * ((load.prompt_tokens + load.output_tokens / 2) / spec.block_tokens + 0.5)).astype(np.int64)
    prompt = np.full(batch.size, max(1, round(load.prompt_tokens)), dtype=np.int64)
    decode, mixed = table.cells(batch, kv, np.zeros_like(batch)), table.cells(batch, kv, prompt)
    step_s = table.seconds[decode].astype(np.float64)
    prefill = np.minimum(rate * np.maximum(table.seconds[mixed] - step_s, 0.0), 0.99)
    stretch = 1.0 / (1.0 - prefill)
    fits = (kv <= 0.85 * spec.kv_blocks)[:, None] & (prefill < 0.99)
    enough = (rows[:, None] >= rate * load.output_tokens * step_s * stretch) & fits
    at = enough.argmax(axis=0), np.arange(step_s.shape[1])
    idle = np.exp(-rows[at[0]])
    prefill_w = np.minimum(prefill[at] / np.maximum(1.0 - idle, 1e-9), 1.0)
    active_w = table.watts[decode][at] * (1.0 - prefill_w) + table.watts[mixed][at] * prefill_w
    return _Settled(
        watts=(1.0 - idle) * active_w + idle * spec.idle_w,
        pace_s=(step_s * stretch)[at],
        stretch=stretch[at],
        held=enough.any(axis=0),
    )
