"""How many engines, and when: risk first, then what pays; and no going back and forth."""

import math

import numpy as np
import pytest

from core.clocks.test_size_planner import LIMITS, SIZES, SPECS, load
from throttllem.core.clocks.cost_curve import cost_curve
from throttllem.core.clocks.size_planner import Demand, size_planner
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.pool.plan import Prices, cheapest
from throttllem.core.pool.planner import PoolPlanner

GPUS, FREE_W = 16, 20.0


class Day:
    """A planner that is asked every 10 s while requests come at a rate; each change is done at once."""

    def __init__(self, engines=None, attainment=0.99, **changes):
        self.planner = PoolPlanner(sizes=size_planner(AutoscaleOptions(**changes), SPECS, offset_s=0.0))
        self.attainment = attainment
        self.engines = engines or {4: 4}
        self.now_s = 0.0
        self.changes = []

    def at(self, rate_rps, seconds, waiting=0):
        """Some time at one rate, with the scatter of a Poisson process in it; the engines after it."""
        demand = Demand(load=load(rate_rps), limits=LIMITS, waiting=waiting)
        for interval in range(round(seconds / 10)):
            scatter = 1.0 + (10.0 * rate_rps) ** -0.5 * (1, -1, 0, 2, -2, 0)[interval % 6]
            for k in range(round(10 * rate_rps * scatter)):
                self.planner.sizes.arrived(self.now_s + 10.0 * k / (10 * rate_rps * scatter), self.attainment)
            self.now_s += 10.0
            wanted = self.planner.wanted(self.now_s, self.engines, demand, SIZES, gpus=GPUS, free_w=FREE_W)
            assert sum(tp * count for tp, count in wanted.items()) <= GPUS
            if wanted != self.engines:
                self.changes.append((self.now_s, wanted))
                self.engines = wanted
        return self.engines


def gpus(engines):
    return sum(tp * count for tp, count in engines.items())


def test_few_engines_stay_where_few_are_enough_and_more_come_at_once():
    day = Day()
    assert gpus(day.at(10.0, 1200.0)) <= 2
    before = day.engines
    after = day.at(150.0, 30.0)
    assert gpus(after) > gpus(before)
    assert all(after.get(tp, 0) >= count for tp, count in before.items()), "those that serve go on"


def test_under_a_constant_load_engines_come_to_rest():
    """After an hour of its own forecasts' errors, half an hour without a change of direction."""
    for rate_rps in (10.0, 60.0):
        day = Day()
        day.at(rate_rps, 3600.0)
        had = len(day.changes)
        day.at(rate_rps, 1800.0)
        directions = [gpus(engines) for _, engines in day.changes[max(0, had - 1) :]]
        assert directions in (sorted(directions), sorted(directions, reverse=True)), rate_rps


def test_nothing_is_done_while_the_load_is_not_known():
    unknown = Demand(load=None, limits=LIMITS, waiting=0)
    planner = PoolPlanner(sizes=size_planner(AutoscaleOptions(), SPECS, offset_s=0.0))
    assert planner.wanted(10.0, {2: 3}, unknown, SIZES, gpus=GPUS, free_w=FREE_W) == {2: 3}


def test_no_engine_is_given_up_before_that_pays_for_its_way_back():
    day = Day()
    day.at(10.0, 1200.0)
    at_s, first = day.changes[0]
    freed = 16 - gpus(first)
    cost_j = SIZES.start_j(4) * freed / 4
    assert at_s > 10.0
    assert cost_j / (16 * 100.0) < at_s


def test_a_requests_that_wait_ask_for_more_engines():
    day = Day()
    day.at(10.0, 1200.0)
    before = day.engines
    assert gpus(day.at(10.0, 10.0, waiting=3000)) > gpus(before)


@pytest.mark.parametrize("attainment", [0.5, 0.99])
def test_a_higher_attainment_keeps_more_engines(attainment):
    day = Day(attainment=attainment)
    for _ in range(20):
        day.at(20.0, 80.0)
        day.at(90.0, 40.0)
    late = [gpus(engines) for at_s, engines in day.changes if at_s > 1200.0] or [gpus(day.engines)]
    assert (min(late) >= 3) is (attainment > 0.9)


CURVES = {tp: cost_curve(load(10.0), SIZES.tables[tp], SPECS[tp], LIMITS) for tp in SPECS}
PRICES = Prices(curves=CURVES, free_w=FREE_W)


@pytest.mark.parametrize("gpus", [8, 64, 1000])
def test_a_day_costs_at_most_5_percent_more_than_with_the_rate_known_and_changes_for_nothing(gpus):
    """A day of an hour, from a fifth of the mean rate to 1.8 times. By the cost curves; an engine starts in 20 s."""
    dice = np.random.default_rng(gpus)
    planner = PoolPlanner(sizes=size_planner(AutoscaleOptions(), SPECS, offset_s=0.0))
    mean_rps = 0.8 * PRICES.holds_rps({4: gpus // 4}) / 1.8
    target = {4: gpus // 4}
    serving, starting = dict(target), []
    ours_w = known_w = late = came = 0.0
    for interval in range(360):
        rate_rps = mean_rps * (1.0 - 0.8 * math.cos(2.0 * math.pi * interval / 360))
        count = int(dice.poisson(10.0 * rate_rps))
        planner.sizes.arrived(10.0 * interval, 0.99)
        planner.sizes.forecast.count += count - 1
        for start in [start for start in starting if start[0] <= interval]:
            starting.remove(start)
            serving[start[1]] = serving.get(start[1], 0) + 1
        if not starting:
            serving = dict(target)
        ours_w += PRICES.watts(serving, rate_rps, gpus) + sum(SPECS[tp].idle_w - FREE_W * tp for _, tp in starting)
        known_w += PRICES.watts(cheapest(PRICES, rate_rps, gpus, needed_rps=rate_rps, least={}), rate_rps, gpus)
        came += count
        late += count * (rate_rps > PRICES.holds_rps(serving))
        demand = Demand(load=load(max(0.1, count / 10.0)), limits=LIMITS, waiting=0)
        wanted = planner.wanted(10.0 * (interval + 1), target, demand, SIZES, gpus=gpus, free_w=FREE_W)
        for tp, engines in wanted.items():
            under_way = sum(size == tp for _, size in starting)
            starting += [(interval + 3, tp)] * max(0, engines - serving.get(tp, 0) - under_way)
        target = wanted
    assert ours_w <= 1.05 * known_w
    assert late <= 0.01 * came
