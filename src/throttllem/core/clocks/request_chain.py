"""Which clock for how many requests: of all ways to choose a clock by the number of requests in the engine, the one of
least mean power.

Knows nothing of the requests at hand, their deadlines or when they end: the clock controller checks those.
"""

# The theory. Requests come at rate r (Poisson) and share the engine as they would share a processor. With n of them in
# flight at clock c, one leaves after every s(n, c) + L / n x t(n, c) seconds: its prompt lengthens one iteration by s,
# and L tokens of an output take L / n iterations of t, since each iteration gives a token to all n. So the number of
# requests is a birth-death chain with mu(n, c), the inverse of that, as its rate of leaving. Its stationary
# distribution depends on the mean of L only (processor sharing is insensitive to the distribution), so exponential
# rates stand for any lengths. Beyond N, the most that fit the engine, requests wait and mu stays mu(N, c).
#
# A clock for each n then is a Markov decision process with a rate of cost: the watts w(n, c), idle watts at n = 0, and
# a price h on every request in flight (George and Harrison, "Dynamic control of a queue with adjustable service rate",
# Operations Research 49, 2001). With g its mean and v(n) the cost that the n-th request adds until there are n - 1,
#
#     v(n) = min over c of (w(n, c) + h n - g + r v(n + 1)) / mu(n, c),      r v(1) = g - idle watts,
#
# solved by policy iteration: g of a policy from the stationary distribution, v from N down (beyond N, where mu is
# constant, v is linear in n: v(n) = a n + b with a = h / (mu - r), b = (w - g + r a) / (mu - r)), then for each n the
# clock that minimises w(n, c) - mu(n, c) v(n); for N, whose clock all beyond share, the one that minimises a N + b. The
# recursion from N down multiplies errors by r / mu at each step, so below the likeliest n it runs from 0 up. Racing
# to idle comes out where it pays: v(1) is then worth a fast and costly end.
#
# SLOs bind means, not each n: a request that meets slow iterations and fast ones gets its tokens at the mean pace. By
# Little's law mean time in flight is E[n] / r, and with processor sharing that of a request with x tokens is
# proportional to x. So a long output meets its E2E SLO if E[n] is small enough, and h, watts per request in flight, is
# raised by bisection until it is. Where no clock does, the maximum it is.

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from throttllem.core.clocks.steady_load import Load
from throttllem.core.compiled import compiled
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.types import EngineSpec

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_MOST_REQUESTS = 160
_MOST_USE = 0.97
"""Of what the engine can do at the maximum clock: a higher load is taken for that, as no chain settles under it."""
_ROUNDING = 1e-9
_PRICES_W = 1.2 ** np.arange(-16, 48)
_NEAR_THE_FASTEST = 1.1
"""Where a long output is late at the maximum clock too, those that would just be in time there should still be."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """What the engine does with n = 1, 2, ... requests in flight, at each clock, shape (requests, clocks) each:
    requests that leave per second, watts, seconds by which a prompt lengthens an iteration, seconds of an iteration.
    `kv_blocks`: those of a mean request.
    """

    kv_blocks: float
    leave_per_s: Floats
    watts: Floats
    prompt_s: Floats
    step_s: Floats


def chain(load: Load, table: PerformanceTable, spec: EngineSpec) -> Chain | None:
    """The chain of a load; None if not even two of its requests fit the engine, or none has come for half a day."""
    if not load.requests_per_s:  # e^-t has become 0
        return None
    blocks = (load.prompt_tokens + load.output_tokens / 2) / spec.block_tokens + 0.5
    most = int(min(spec.max_batch, 0.9 * spec.kv_blocks / blocks, _MOST_REQUESTS))
    if most < 2:
        return None
    requests = np.arange(1, most + 1)
    kv = (requests * blocks).astype(np.int64)
    decode = table.cells(requests, kv, np.zeros_like(requests))
    mixed = table.cells(requests, kv, np.full(most, max(1, round(load.prompt_tokens)), dtype=np.int64))
    step_s = table.seconds[decode].astype(np.float64)
    prompt_s = np.maximum(table.seconds[mixed] - step_s, 0.0)
    decode_s = load.output_tokens / requests[:, None] * step_s
    leave_per_s = 1.0 / (prompt_s + decode_s)
    mixed_s = np.minimum(prompt_s + step_s, prompt_s + decode_s)
    share = mixed_s * leave_per_s
    watts = table.watts[mixed] * share + table.watts[decode] * (1.0 - share)
    return Chain(kv_blocks=blocks, leave_per_s=leave_per_s, watts=watts, prompt_s=prompt_s, step_s=step_s)


def open_clocks(load: Load, states: Chain, tbt_s: float) -> Bools:
    """Clocks at which tokens come `tbt_s` apart at most in the mean, prompts of others included; (requests, clocks)."""
    if not math.isfinite(tbt_s):
        return np.ones_like(states.step_s, dtype=np.bool_)
    in_time: Bools = states.step_s <= tbt_s * (1.0 - load.requests_per_s * states.prompt_s)
    return in_time


@dataclass(frozen=True, slots=True, eq=False)
class Pace:
    """A clock for each number of requests, and what comes of it: requests in flight, and seconds of a prompt, in the
    mean.
    """

    column: Ints
    mean_requests: float
    prompt_s: float


def least_energy_pace(load: Load, states: Chain, is_open: Bools, spec: EngineSpec, *, reserve: float) -> Pace:
    """The pace of least mean power at which a long output meets its E2E SLO less `reserve` of it.

    `is_open` (requests, clocks): which clocks may be chosen; the maximum is where none may.
    """
    rate = most_rate(load, states)
    is_open = is_open.copy()
    is_open[:, -1] |= ~is_open.any(axis=1)
    leave_per_s, watts = by_clock(states, is_open)

    def priced(price_w: float, watts: Floats) -> tuple[Pace, float]:
        """The pace at a price, and seconds that a long output takes at it."""
        pace = Pace(*least_mean_watts(rate, leave_per_s, watts, states.prompt_s, spec.idle_w, price_w))
        token_s = (pace.mean_requests / rate - pace.prompt_s) / load.output_tokens
        return pace, pace.prompt_s + load.long_output_tokens * token_s

    pace, long_s = priced(0.0, watts)
    if load.e2e_s is None or long_s <= load.e2e_s * (1.0 - reserve):
        return pace
    maximum_w = np.full_like(watts, np.inf)
    maximum_w[-1] = states.watts[:, -1]
    most_s = max(load.e2e_s * (1.0 - reserve), _NEAR_THE_FASTEST * priced(0.0, maximum_w)[1])
    low, high = 0, _PRICES_W.size - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if priced(float(_PRICES_W[middle]), watts)[1] <= most_s else (middle + 1, high)
    return priced(float(_PRICES_W[low]), watts)[0]


def most_rate(load: Load, states: Chain) -> float:
    """Requests per second of the load, or the most under which a chain settles."""
    return min(load.requests_per_s, _MOST_USE * float(states.leave_per_s[-1].max()))


def by_clock(states: Chain, is_open: Bools) -> tuple[Floats, Floats]:
    """Requests that leave per second, and watts (inf at a clock that is not open), both (clocks, requests)."""
    return np.ascontiguousarray(states.leave_per_s.T), np.ascontiguousarray(np.where(is_open, states.watts, np.inf).T)


@compiled
def least_mean_watts(
    rate: float, leave_per_s: Floats, watts: Floats, prompt_s: Floats, idle_w: float, price_w: float
) -> tuple[Ints, float, float]:
    """Policy iteration from the highest open clocks on: the column for each number of requests, the mean number of
    requests in flight, and the mean seconds of a prompt.

    `leave_per_s` and `watts` (clocks, requests), as `by_clock` has them, `prompt_s` (requests, clocks). Clocks are
    compared for all numbers of requests side by side, several in one instruction. A clock is left for one that saves
    more than rounding may: else equals take turns for ever.
    """
    clocks, most = leave_per_s.shape
    column = np.zeros(most, dtype=np.int64)
    for c in range(clocks):
        for n in range(most):
            column[n] = c if watts[c, n] < np.inf else column[n]
    best, least_w = np.empty_like(column), np.empty(most)
    added = np.empty(most)
    likely = np.empty(most + 1)
    mean_requests = mean_prompt_s = 0.0
    for _ in range(40):
        likely[0] = 1.0
        whole, cost = 1.0, idle_w
        likeliest, peak = 0, 1.0
        mean_requests = mean_prompt_s = busy = 0.0
        for n in range(1, most + 1):
            c = column[n - 1]
            ratio = rate / leave_per_s[c, n - 1]
            likely[n] = likely[n - 1] * ratio
            if likely[n] > 1e200:
                scale = likely[n]
                whole /= scale
                cost /= scale
                mean_requests /= scale
                mean_prompt_s /= scale
                busy /= scale
                peak /= scale
                likely[n] = 1.0
            if likely[n] > peak:
                likeliest, peak = n, likely[n]
            here, further = likely[n], float(n)
            if n == most:  # and all beyond, a geometric tail
                here /= 1.0 - ratio
                further = n + ratio / (1.0 - ratio)
            whole += here
            busy += here
            cost += here * (watts[c, n - 1] + price_w * further)
            mean_requests += here * further
            mean_prompt_s += here * prompt_s[n - 1, c]
        mean_cost = cost / whole
        mean_requests /= whole
        mean_prompt_s /= busy
        c = column[most - 1]
        added[most - 1] = _until_fewer(rate, leave_per_s[c, most - 1], watts[c, most - 1] - mean_cost, price_w, most)
        # Each recursion where it damps errors: from the top down to the likeliest number of requests, and from 0 up.
        for n in range(most - 1, likeliest, -1):
            c = column[n - 1]
            added[n - 1] = (watts[c, n - 1] + price_w * n - mean_cost + rate * added[n]) / leave_per_s[c, n - 1]
        spent, gone = idle_w, 0.0
        for n in range(min(likeliest, most - 1)):
            added[n] = (mean_cost - spent + gone) / rate
            c = column[n]
            spent, gone = watts[c, n] + price_w * (n + 1), leave_per_s[c, n] * added[n]
        least_w[:] = np.inf
        for c in range(clocks - 1, -1, -1):
            leave, costs = leave_per_s[c], watts[c]
            for n in range(most - 1):
                here_w = costs[n] - leave[n] * added[n]
                better = here_w < least_w[n]
                best[n] = c if better else best[n]
                least_w[n] = here_w if better else least_w[n]
        changed = False
        for n in range(most - 1):
            c = column[n]
            now_w = watts[c, n] - leave_per_s[c, n] * added[n]
            if least_w[n] < now_w - _ROUNDING * abs(now_w):
                column[n] = best[n]
                changed = True
        for c in range(clocks - 1, -1, -1):  # one clock for all numbers from here on
            if leave_per_s[c, most - 1] > rate and watts[c, most - 1] < np.inf:
                cost = _until_fewer(rate, leave_per_s[c, most - 1], watts[c, most - 1] - mean_cost, price_w, most)
                if cost < added[most - 1] - _ROUNDING * abs(added[most - 1]):
                    column[most - 1], added[most - 1] = c, cost
                    changed = True
        if not changed:
            break
    return column, mean_requests, mean_prompt_s


@compiled
def _until_fewer(rate: float, leave_per_s: float, above_mean_w: float, price_w: float, requests: int) -> float:
    """The cost above the mean from when there are `requests` until there are fewer, at one clock however many come."""
    drift = leave_per_s - rate
    slope = price_w / drift
    return slope * requests + (above_mean_w + rate * slope) / drift
