"""What is possible if the whole future is known: a search for the schedule of clocks of least energy.

`search` finds a clock for every SEGMENT_S ("sched"); `search_holding` may hold requests back as well ("sched+hold").
Both are achievable, not optimal: what they find is a run of the simulator. `bound.py` says what nothing can go below.
Knows nothing of cells and policies.
"""

# The search. Coordinate descent from several starts: walk through the run, and try each segment (20 s at first, then
# 10 s, then 5 s) some steps slower and faster; keep what costs less. A segment whose change was kept takes larger steps
# in the next pass, another one smaller steps, so passes become cheap where nothing is left to gain. The starts are the
# best static clock, and the best schedule that follows the load: clock in proportion to (requests in the system) **
# exponent, for a few exponents, each as low as attainment allows. Neither is the better start on all traces: what is
# found differs by up to one point of the baseline's energy.
#
# Attainment is a price: a run costs its joules, and `price_j` for every request that misses its SLO beyond those that
# may. The price begins at what a request costs along the static clocks (in one descent at less, so that it moves more
# freely), and is doubled after each pass that ends with too few. The best run that meets enough is kept.
#
# A change at a time leaves the run before it as it was: candidates continue from a copy of the run at that time. What a
# candidate costs is the simulator's own result, to the bit, with the noise of its iterations. The effort is bounded by
# `evaluations`, runs from somewhere to the end, so the result does not depend on the machine.

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from throttllem.arena.schedule import (
    Achieved,
    Floats,
    Holds,
    Ints,
    Plan,
    Task,
    cheapest,
    every,
    every_static,
    static,
)
from throttllem.sim.schedule import Held

SEGMENT_S = 5.0
"""A schedule's clock may change this often."""
EVALUATIONS = 900
"""Of one descent; `search` makes three, `search_holding` one."""
_WIDTHS = (4, 4, 2, 2, 1)
"""Segments that a pass moves together; the last width is that of all later passes."""
_FIRST_STEP, _LARGEST_STEP = 8, 32
"""Clocks by which a segment moves."""
_EXPONENTS = (0.2, 0.4, 0.6, 0.8, 1.0)
_HALVINGS = 7
_SAMPLES = 10
_LOW_PRICE = 0.3
_PERIODS_S = (2.0, 3.0, 5.0, 8.0, 12.0, 18.0, 27.0, 40.0, 60.0)
_BORDER_STEPS_S = (1.0, -1.0, 3.0, -3.0)
_LEAST_GAIN = 1e-5
"""A pass over single segments that gains less than this fraction of the energy is the last one."""


def search(task: Task, *, evaluations: int = EVALUATIONS) -> Achieved:
    """The cheapest schedule of clocks found. Raises ValueError if no static clock meets enough."""
    statics = every_static(task)
    fixed = cheapest(task, statics)
    price_j = price_of_a_miss(task, statics, fixed)
    starts = [(fixed, price_j), (following(task, fixed), price_j), (fixed, _LOW_PRICE * price_j)]
    found = [Descent(task, start, price_j=price_j, evaluations=evaluations).settle() for start, price_j in starts]
    return cheapest(task, found)


def search_holding(task: Task, found: Achieved, *, evaluations: int = EVALUATIONS) -> Achieved:
    """The cheapest found if requests may be held back too; `found`, the result of `search`, if that brings nothing."""
    start = gathered(task)
    if start is None:
        return found
    price_j = max(found.energy_j / max(1, task.requests.arrival_s.size), 1.0)
    return cheapest(task, [found, Descent(task, start, price_j=price_j, evaluations=evaluations).settle()])


def price_of_a_miss(task: Task, statics: list[Achieved], best: Achieved) -> float:
    """Joules that one more met request costs along the static clocks around the best; at least a third of a request's
    mean energy.
    """
    at = int(best.plan.clocks[0])
    low, high = statics[max(0, at - 6)], statics[min(len(statics) - 1, at + 6)]
    along = (high.energy_j - low.energy_j) / max(1, high.met - low.met)
    return max(along, best.energy_j / max(1, task.requests.arrival_s.size) / 3)


# ---- where to start ----------------------------------------------------------------------------------------------


def segments(task: Task) -> int:
    """How many a schedule has."""
    return max(1, math.ceil(task.window_s / SEGMENT_S))


def following(task: Task, fixed: Achieved) -> Achieved:
    """The cheapest schedule that follows the number of requests in the system; `fixed` if none is cheaper."""
    mhz, best = np.array(task.clocks_mhz, dtype=np.float64), fixed
    for exponent in _EXPONENTS:
        load = in_system(task, best.plan) ** exponent
        low, high = mhz[fixed.plan.clocks[0]] / 2, mhz[fixed.plan.clocks[0]] * 2
        for _ in range(_HALVINGS):
            scale = math.sqrt(low * high)
            clocks = np.abs(mhz[None, :] - (scale / load.mean() * load)[:, None]).argmin(axis=1)
            tried = task.run(Plan(segment_s=SEGMENT_S, clocks=clocks))
            low, high = (scale, high) if tried.met < task.least_met else (low, scale)
            if tried.met >= task.least_met and tried.energy_j < best.energy_j:
                best = tried
    return best


def in_system(task: Task, plan: Plan) -> Floats:
    """Mean number of requests that wait or run, by segment; at least one half."""
    run, count = task.advance(task.engine.begin(), plan), segments(task)
    times_s = (np.arange(count * _SAMPLES) + 0.5) * (SEGMENT_S / _SAMPLES)
    fits = ~np.isnan(run.ended_s)
    came = np.searchsorted(np.sort(task.requests.arrival_s[fits]), times_s)
    went = np.searchsorted(np.sort(run.ended_s[fits]), times_s)
    number: Floats = np.maximum((came - went).reshape(count, _SAMPLES).mean(axis=1), 0.5)
    return number


def gathered(task: Task) -> Achieved | None:
    """The best way to gather requests for a fixed time, with one clock; None if all miss too much."""
    found: list[Achieved] = []
    for period_s in _PERIODS_S:
        holds = every(period_s, float(task.requests.arrival_s.max(initial=0.0)))
        low, high = -1, len(task.clocks_mhz) - 1
        tried = task.run(static(high, holds))
        if tried.met < task.least_met:
            break  # a longer time misses more
        found.append(tried)
        while high - low > 1:
            middle = (low + high) // 2
            tried = task.run(static(middle, holds))
            low, high = (middle, high) if tried.met < task.least_met else (low, middle)
            found.append(tried)
    return cheapest(task, found) if found else None


# ---- descent -----------------------------------------------------------------------------------------------------


class Descent:
    """Coordinate descent from one start. Call `settle` once."""

    def __init__(self, task: Task, start: Achieved, *, price_j: float, evaluations: int) -> None:
        self._task = task
        self._price_j = price_j
        self._left = evaluations
        self._steps: Ints = np.full(segments(task), _FIRST_STEP, dtype=np.int64)
        clocks = start.plan.clocks
        if clocks.size == 1:
            clocks = np.full(segments(task), clocks[0], dtype=np.int64)
        self._best = start
        self._here = replace(start, plan=replace(start.plan, segment_s=SEGMENT_S, clocks=clocks))

    def settle(self) -> Achieved:
        """Pass after pass, until one gains nothing or the effort is spent; the cheapest outcome that meets enough."""
        number = 0
        while self._left > 0:
            before_j = self._cost_j(self._here)
            self._pass_over_clocks(_WIDTHS[min(number, len(_WIDTHS) - 1)], first=-1 if number % 2 == 0 else 1)
            if self._here.plan.holds is not None and number % 2 == 1:
                self._pass_over_holds(self._here.plan.holds)
            if self._here.met < self._task.least_met:
                self._price_j *= 2
            elif number >= len(_WIDTHS) and before_j - self._cost_j(self._here) < _LEAST_GAIN * before_j:
                break
            number += 1
        return self._best

    def _pass_over_clocks(self, width: int, *, first: int) -> None:
        """Try `width` segments at a time some steps lower and higher; `first`: which of the two is tried first."""
        count, run = self._here.plan.clocks.size, self._task.engine.begin()
        for begin in range(0, count, width):
            end = min(begin + width, count)
            until_s = end * SEGMENT_S if end < count else math.inf
            after = self._task.advance(run.copy(), self._here.plan, until_s)
            if after.iterations > run.iterations and self._left > 0:
                moves = (self._shifted(begin, end, sign * int(self._steps[begin])) for sign in (first, -first))
                if any(self._try(run, move) for move in moves):
                    self._steps[begin:end] = np.minimum(self._steps[begin:end] * 2, _LARGEST_STEP)
                    after = self._task.advance(run.copy(), self._here.plan, until_s)
                else:
                    self._steps[begin:end] = np.maximum(self._steps[begin:end] // 2, 1)
            run = after

    def _shifted(self, begin: int, end: int, steps: int) -> Plan:
        clocks = self._here.plan.clocks.copy()
        clocks[begin:end] = np.clip(clocks[begin:end] + steps, 0, len(self._task.clocks_mhz) - 1)
        return replace(self._here.plan, clocks=clocks)

    def _pass_over_holds(self, holds: Holds) -> None:
        """Try to end each time of holding earlier and later, and to hold nothing back in it."""
        run = self._task.engine.begin()
        for interval in range(holds.held.size):
            run = self._task.advance(run, self._here.plan, float(holds.border_s[interval]))
            for other in changed(holds, interval):
                if self._try(run, replace(self._here.plan, holds=other)):
                    holds = other
                    break

    def _try(self, run: Held, plan: Plan) -> bool:
        """Go over to a plan that differs from the present one from the end of `run` on, if it costs less."""
        unchanged = plan.holds is self._here.plan.holds and bool((plan.clocks == self._here.plan.clocks).all())
        if unchanged or self._left <= 0:
            return False
        self._left -= 1
        tried = self._task.outcome(self._task.advance(run.copy(), plan), plan)
        if tried.met >= self._task.least_met and tried.energy_j < self._best.energy_j:
            self._best = tried
        if self._cost_j(tried) >= self._cost_j(self._here):
            return False
        self._here = tried
        return True

    def _cost_j(self, outcome: Achieved) -> float:
        return outcome.energy_j + self._price_j * max(0, self._task.least_met - outcome.met)


def changed(holds: Holds, interval: int) -> list[Holds]:
    """The times of holding with one of them changed: joined with the next, ended at another time, or not held."""
    begin_s, end_s = holds.border_s[interval], holds.border_s[interval + 1]
    latest_s = holds.border_s[interval + 2] if interval + 2 < holds.border_s.size else end_s
    others = []
    for to_s in (latest_s, *(end_s + step_s for step_s in _BORDER_STEPS_S)):
        if begin_s < to_s <= latest_s and to_s != end_s:
            border_s = holds.border_s.copy()
            border_s[interval + 1] = to_s
            others.append(replace(holds, border_s=border_s))
    held = holds.held.copy()
    held[interval] = not held[interval]
    return [*others, replace(holds, held=held)]
