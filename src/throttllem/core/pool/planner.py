"""How many engines of each size a pool should have, by energy and risk (`least-energy+autoscale` of a pool).

Knows nothing of how engines are started, drained or stopped.
"""

# The theory is that of one engine's size (`clocks/size_planner`), for sets of engines.
#
# Risk. Engines are enough if so few of the requests of the coming time are late, until another engine could be up, that
# the attainment asked is met. What they must hold for that (`needed_rps`) follows from the distribution of the coming
# rate. Where the present ones hold less, the cheapest that hold it and keep all present ones are wanted at once. What
# comes beyond what engines hold makes their batches larger. Sequences share their iterations, so their times between
# tokens rise together: under a TBT SLO only a fifth of a request's time is taken to lie between the last request that
# is in time and the first.
#
# Energy. The watts by which the present engines are dearer than the cheapest that are enough are added up (`forgone_j`)
# until they come to what the change costs: starts, and the last requests of engines that drain; where the change frees
# GPUs, the way back too. That is never more than twice what hindsight would have paid. The cheapest engines are those
# that would have been enough ever since the sum began: a pool that shrank for a quiet minute would only grow again. The
# sum begins again from nothing with each change, and when the cheapest ones lie on the other side of the present ones.
# So under a constant load the pool changes its direction at most once in the time in which a change pays.
#
# Time of day. Where the profile of the day is known, a change must also pay before that ends it.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from throttllem.core.clocks.size_planner import Demand, SizePlanner, Sizes
from throttllem.core.clocks.steady_load import Load
from throttllem.core.pool.plan import Prices, cheapest

_TBT_SPREAD = 0.2
_STEPS = 24
_MOST_DOUBLINGS = 64


@dataclass(slots=True, kw_only=True)
class PoolPlanner:
    """Forecasts the rate and prices sizes with `sizes`, and selects the engines to run.

    `forgone_j`: joules that the present engines cost more than the cheapest, since they were last as cheap or changed;
    `freed`: GPUs that the cheapest leave free beside the present ones, negative if they take more; `needed_rps`: the
    most that was to be held since.
    """

    sizes: SizePlanner
    forgone_j: float = 0.0
    freed: int = 0
    needed_rps: float = 0.0

    def wanted(
        self, now_s: float, current: Mapping[int, int], demand: Demand, sizes: Sizes, *, gpus: int, free_w: float
    ) -> dict[int, int]:
        """The engines to run from now on, by size; the `current` ones while nothing is to be done. To be called every
        interval.
        """
        load, passed_s = demand.load, self.sizes.prepare(now_s, demand, sizes)
        if load is None or passed_s is None:
            return dict(current)
        rate_rps, needed_rps = self.sizes.forecast.rate_rps(), self._needed_rps(demand)
        prices = Prices(curves={tp: priced.curve for tp, priced in self.sizes.priced.items()}, free_w=free_w)
        if prices.holds_rps(current) < needed_rps:
            self._changed()
            return cheapest(prices, rate_rps, gpus, needed_rps=needed_rps, least=current)
        self.needed_rps = max(self.needed_rps, needed_rps)
        best = cheapest(prices, rate_rps, gpus, needed_rps=self.needed_rps, least={}) or dict(current)
        saved_w = prices.watts(current, rate_rps, gpus) - prices.watts(best, rate_rps, gpus)
        freed = _gpus(current) - _gpus(best)
        if best == dict(current) or saved_w <= 0.0 or freed * self.freed < 0:
            self._changed()
            self.freed = freed
            return dict(current)
        self.freed = freed
        self.forgone_j += saved_w * passed_s
        cost_j = _change_j(current, best, sizes, load)
        if self.forgone_j < cost_j or not self._pays(prices, current, best, cost_j, gpus):
            return dict(current)
        self._changed()
        return best

    def _changed(self) -> None:
        self.forgone_j, self.freed, self.needed_rps = 0.0, 0, 0.0

    def _needed_rps(self, demand: Demand) -> float:
        """The least rate that engines must hold so that no more requests are late than may be."""
        may_be_late, slack_s = self.sizes.may_be_late or 0.0, _slack_s(demand)
        low, high = 0.0, max(float(self.sizes.forecast.coming_rps().max()), 1e-9)
        for _ in range(_MOST_DOUBLINGS):
            if self.sizes.late(high, demand, slack_s=slack_s) <= may_be_late:
                break
            low, high = high, 2.0 * high
        for _ in range(_STEPS):
            middle = (low + high) / 2.0
            low, high = (
                (low, middle) if self.sizes.late(middle, demand, slack_s=slack_s) <= may_be_late else (middle, high)
            )
        return high

    def _pays(
        self, prices: Prices, current: Mapping[int, int], best: Mapping[int, int], cost_j: float, gpus: int
    ) -> bool:
        """Whether the change pays before the profile of the day ends it; True where there is no profile."""
        ahead = self.sizes.ahead_rps()
        if ahead is None:
            return True
        holds_rps = prices.holds_rps(best)
        held = takewhile(lambda rate_rps: rate_rps <= holds_rps, ahead)
        saved_w = (prices.watts(current, rate, gpus) - prices.watts(best, rate, gpus) for rate in held)
        return sum(saved_w) * self.sizes.slot_s > cost_j


def _slack_s(demand: Demand) -> float:
    """The wait that makes every request late: that of one size, and no more than the TBT SLO leaves to a request."""
    if demand.load is None:
        return demand.slack_s
    return min(demand.slack_s, _TBT_SPREAD * demand.limits.tbt_s * demand.load.output_tokens)


def _change_j(current: Mapping[int, int], wanted: Mapping[int, int], sizes: Sizes, load: Load) -> float:
    """Joules of a change; where it frees GPUs, of the change back too."""
    there_j = back_j = 0.0
    for tp in {*current, *wanted}:
        more = wanted.get(tp, 0) - current.get(tp, 0)
        start_j, drain_j = sizes.start_j(tp) * abs(more), sizes.drain_j(tp, load) * abs(more)
        there_j += start_j if more > 0 else drain_j
        back_j += drain_j if more > 0 else start_j
    return there_j + (back_j if _gpus(wanted) < _gpus(current) else 0.0)


def _gpus(engines: Mapping[int, int]) -> int:
    return sum(tp * count for tp, count in engines.items())
