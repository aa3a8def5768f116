"""Which size, and when: risk first, then what pays."""

import pytest

from core.toy import spec, table
from throttllem.core.clocks.rate_forecast import SLOTS
from throttllem.core.clocks.size_planner import Sizes, size_planner
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.clocks.steady_load import Load

SPECS = {tp: spec(tp=tp, idle_w=40.0 * tp, kv_blocks=64 * tp, max_batch=8 * tp, startup_s=20.0) for tp in (1, 2, 4)}
SIZES = Sizes(specs=SPECS, tables={tp: table(some) for tp, some in SPECS.items()}, reserve=0.05)
CAPACITY = {1: 2.0, 2: 4.0, 4: 10.0}


class Day:
    """A planner that is asked every 10 s while requests come at a rate; `tp` runs, and each change is done at once."""

    def __init__(self, tp=4, **changes):
        self.options = AutoscaleOptions(capacity_rps=CAPACITY, **changes)
        self.planner = size_planner(self.options, SPECS, offset_s=0.0)
        self.tp = tp
        self.now_s = 0.0
        self.changes = []

    def at(self, rate_rps, seconds):
        """Some time at one rate; the size after it."""
        load = Load(
            requests_per_s=rate_rps,
            prompt_tokens=10.0,
            output_tokens=12.0,
            long_output_tokens=20.0,
            burst=1.2,
            e2e_s=30.0,
        )
        for _ in range(round(seconds / 10)):
            for k in range(round(10 * rate_rps)):
                self.planner.arrived(self.now_s + k / rate_rps)
            self.now_s += 10.0
            wanted = self.planner.wanted(self.now_s, self.tp, load, SIZES)
            if wanted != self.tp:
                self.changes.append((self.now_s, wanted))
                self.tp = wanted
                self.planner.changed()
        return self.tp


def test_a_light_load_goes_to_the_smallest_size_once_that_pays():
    day = Day()
    assert day.at(0.5, 3600.0) == 1
    first_s, _ = day.changes[0]
    planner, load_w = day.planner, {tp: day.planner.priced[tp].curve.watts_at(0.5) for tp in SPECS}
    saved_w = load_w[4] - load_w[1]
    there_and_back_j = 20.0 * (40.0 + 160.0)  # the starts alone
    assert first_s - 10.0 >= there_and_back_j / saved_w
    assert planner.forgone_j == {tp: pytest.approx(0.0) for tp in planner.forgone_j} or day.tp == 1


def test_nothing_is_done_while_the_load_is_not_known():
    planner = Day().planner
    assert planner.wanted(10.0, 2, None, SIZES) == 2


def test_a_size_that_is_not_enough_is_left_at_once():
    day = Day()
    day.at(0.5, 3600.0)
    day.changes.clear()
    day.at(8.0, 60.0)
    assert day.tp == 4
    assert day.changes[0][0] <= 3600.0 + 20.0


def test_a_size_of_which_bursts_are_beyond_is_not_enough():
    """2.6 of every 12 requests come above what TP 1 holds, though on the mean it holds them."""
    steady, bursty = Day(), Day()
    assert steady.at(1.5, 3600.0) == 1
    for _ in range(30):
        bursty.at(0.5, 80.0)
        bursty.at(5.5, 40.0)
    assert all(tp > 1 for _, tp in bursty.changes[-3:]) or bursty.tp > 1


def test_a_lower_attainment_takes_more_risk():
    def busy(attainment):
        day = Day(attainment=attainment)
        for _ in range(30):
            day.at(1.0, 80.0)
            day.at(2.6, 40.0)
        return day.tp

    assert busy(0.5) <= busy(0.99)
    assert busy(0.99) > 1


def test_the_profile_of_a_day_keeps_a_change_that_would_not_pay():
    """Half of an hour-long day is light. On the third day, with 30 s of it to go, no change pays any more."""
    day_s = 7200.0
    first = Day(day_s=day_s)
    for _ in range(2):
        first.at(0.5, day_s / 2)
        first.at(8.0, day_s / 2)
    ahead = first.planner.forecast.ahead_rps(3)
    assert ahead is not None
    assert min(first.planner.forecast.profile_rps) >= 0.0
    assert len(first.planner.forecast.profile_rps) == SLOTS
    assert first.planner._pays(4, 1, 1e3)
    first.at(0.5, day_s / 2 - 30.0)
    assert not first.planner._pays(4, 1, 1e6)
