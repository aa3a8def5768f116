"""How many requests will come until another engine could be up? The recent rate, what such forecasts were worth so far,
and the rate's course over a day.

State of the core, with O(1) updates. Knows nothing of engines, nor of the calendar but the time of day.
"""

# The theory. Arrivals are counted in equal intervals. The level is their exponentially weighted mean; the forecast for
# the next `lead` intervals is the level, moved as the same time of the day before moved (once it is known).
#
# How far the truth may lie from it is not assumed but learned, as split conformal prediction does it: each forecast is
# kept until its intervals are over, and the ratio of what came to what was forecast joins the recent ratios. They hold
# whatever the load does: Poisson noise, bursts, trends, steps. The distribution of the coming rate is the level times
# these ratios. Three ratios that were never seen (half, as much, twice) count among them, so that a young forecast
# holds a doubling possible.
#
# The profile holds the mean rate of each of 144 slots of the day. A later day moves it by a third, so it is a mean of
# the last few days, and a day off does not erase it. Only ratios between slots are used: a busier week keeps the shape.

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

SLOTS = 144
"""Slots of the daily profile."""
_LEVEL_S = 60.0  # time constant of the level
_SEEN = 0.63  # a level that has seen about its time constant is judged by what comes; a younger one is chance
_RATIOS = 720  # at intervals of 10 s, those of two hours
_UNSEEN = (0.5, 1.0, 2.0)
_LATER_DAY = 1.0 / 3.0
_MOST_SHIFT = 4.0  # between two slots of the profile the level moves by this factor at most
_MOST_INTERVALS = 8640  # a longer silence is not counted interval by interval


@dataclass(slots=True, kw_only=True)
class RateForecast:
    """Arrivals in intervals of `interval_s`, and a forecast for `lead` of them. A day has `day_s`; it began `offset_s`
    before the driver's time 0.

    `since_s`: when the open interval began (None: no request yet), `count` its requests. `level` are the weighted sums
    of rates and of ones. `counts` and `forecasts` (requests) of the last `lead` intervals, `ratios` what came over what
    was forecast. `profile_rps`: mean rate of each slot (negative: none yet); `slot` is the one that is under way, since
    `slot_s`, with `slot_requests` so far.
    """

    interval_s: float
    lead: int
    day_s: float
    offset_s: float
    since_s: float | None = None
    count: int = 0
    level: tuple[float, float] = (0.0, 0.0)
    counts: deque[int] = field(default_factory=deque)
    forecasts: deque[float] = field(default_factory=deque)
    ratios: deque[float] = field(default_factory=deque)
    profile_rps: deque[float] = field(default_factory=lambda: deque([-1.0] * SLOTS))
    slot: int | None = None
    slot_s: float = 0.0
    slot_requests: int = 0

    def arrived(self, now_s: float, sequences: int) -> None:
        """Count one request by the `sequences` that it runs. O(1) amortised."""
        self.advance(now_s)
        self.count += sequences

    def advance(self, now_s: float) -> None:
        """Close the intervals that are over."""
        if self.since_s is None:
            self.since_s = now_s
        if now_s - self.since_s > _MOST_INTERVALS * self.interval_s:
            self.since_s, self.count, self.level, self.slot = now_s, 0, (0.0, 0.0), None
            self.counts.clear()
            self.forecasts.clear()
        # Of a time so late that an interval is less than its rounding, none is over.
        while now_s >= self.since_s + self.interval_s > self.since_s:
            self._close(self.since_s)
            self.since_s += self.interval_s
            self.count = 0

    def rate_rps(self) -> float:
        """The level; 0 before the first interval is over."""
        total, weight = self.level
        return total / weight if weight else 0.0

    def coming_rps(self) -> npt.NDArray[np.float64]:
        """Equally likely mean rates of the coming `lead` intervals, any order; all 0 before the first is over."""
        expected_rps = self.rate_rps() * self._shift(0.0, self.lead * self.interval_s)
        return expected_rps * np.array([*self.ratios, *_UNSEEN])

    def ahead_rps(self, spans: int) -> list[float] | None:
        """Mean rates of the next `spans` slots' lengths, as the profile moves the level; None where it is not known."""
        slot_s = self.day_s / SLOTS
        if self.slot is None or any(self._profile_at(slot_s * n) < 0.0 for n in range(spans + 1)):
            return None
        return [self.rate_rps() * self._shift(slot_s * n, slot_s * (n + 1)) for n in range(spans)]

    def _close(self, began_s: float) -> None:
        rate, keep = self.count / self.interval_s, math.exp(-self.interval_s / _LEVEL_S)
        total, weight = self.level
        self.level = (total * keep + rate * (1.0 - keep), weight * keep + (1.0 - keep))
        self.counts.append(self.count)
        if len(self.counts) > self.lead:
            self.counts.popleft()
        if len(self.forecasts) == self.lead:
            self.ratios.append((sum(self.counts) + 0.5) / (self.forecasts.popleft() + 0.5))
            if len(self.ratios) > _RATIOS:
                self.ratios.popleft()
        self._learn(began_s)
        lead_s = self.lead * self.interval_s
        if self.level[1] >= _SEEN:
            self.forecasts.append(self.rate_rps() * self._shift(0.0, lead_s) * lead_s)

    def _learn(self, began_s: float) -> None:
        """One interval of the profile; a slot that was seen as a whole is part of it when it is over."""
        slot_s = self.day_s / SLOTS
        slot = int((began_s + self.offset_s) % self.day_s / slot_s)
        if slot != self.slot:
            if self.slot is not None and began_s - self.slot_s > 0.9 * slot_s:
                rate, before = self.slot_requests / (began_s - self.slot_s), self.profile_rps[self.slot]
                self.profile_rps[self.slot] = rate if before < 0.0 else before + _LATER_DAY * (rate - before)
            self.slot, self.slot_s, self.slot_requests = slot, began_s, 0
        self.slot_requests += self.count

    def _shift(self, from_s: float, to_s: float) -> float:
        """By what factor the profile moves the level, from its age to the middle of a span from now; 1 if not known."""
        before, then = self._profile_at(-_LEVEL_S), self._profile_at((from_s + to_s) / 2.0)
        if before < 0.0 or then < 0.0:
            return 1.0
        floor = 0.01 * max(self.profile_rps)
        return min(max((then + floor) / (before + floor), 1.0 / _MOST_SHIFT), _MOST_SHIFT) if floor else 1.0

    def _profile_at(self, later_s: float) -> float:
        """The profile's rate at a time from now, straight between the middles of its slots; negative: not known."""
        assert self.since_s is not None
        at = (self.since_s + later_s + self.offset_s) % self.day_s / (self.day_s / SLOTS) - 0.5
        low = math.floor(at)
        first, second = self.profile_rps[low % SLOTS], self.profile_rps[(low + 1) % SLOTS]
        return -1.0 if min(first, second) < 0.0 else first + (at - low) * (second - first)
