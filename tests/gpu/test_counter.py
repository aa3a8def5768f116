"""Energy out of counters that are refreshed seldom, restart, or do not exist."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.gpu.counter import COMPARED_S, MOST_AHEAD_S, EnergyCounter


def test_between_two_refreshes_it_integrates_power():
    counter = EnergyCounter()
    counter.sample(10.0, 200.0, 5000.0)
    assert counter.joules(10.05) == pytest.approx(10.0)
    counter.sample(10.05, 200.0, 5000.0)  # has not moved
    assert counter.joules(10.1) == pytest.approx(20.0)
    counter.sample(10.1, 200.0, 5018.0)
    assert counter.joules(10.1) == pytest.approx(20.0)  # 18, but it never falls
    assert counter.joules(10.2) == pytest.approx(38.0)


def test_estimates_do_not_accumulate():
    """The counter rises by 15 J in each 100 ms, power is read as 200 W: after 10 s the counter is reported."""
    counter = EnergyCounter()
    for tick in range(101):
        counter.sample(tick / 10, 200.0, 15.0 * tick)
        counter.joules(tick / 10 + 0.05)
    assert counter.joules(10.0) == pytest.approx(1500.0, abs=11.0)


def test_a_counter_that_stands_still_bounds_the_estimate():
    counter = EnergyCounter()
    counter.sample(0.0, 100.0, 1.0)
    assert counter.joules(60.0) == pytest.approx(100.0 * MOST_AHEAD_S)


def test_a_reloaded_driver_counts_from_zero():
    counter = EnergyCounter()
    counter.sample(0.0, 100.0, 5000.0)
    counter.sample(1.0, 100.0, 5100.0)
    counter.sample(2.0, 100.0, 3.0)
    assert counter.joules(2.0) == pytest.approx(100.0)
    counter.sample(3.0, 100.0, 103.0)
    assert counter.joules(3.0) == pytest.approx(200.0)


def test_without_a_counter_power_is_integrated():
    counter = EnergyCounter()
    for at_s, watts in ((1.0, 100.0), (2.0, 300.0), (4.0, 300.0)):
        counter.sample(at_s, watts, None)
    assert counter.joules(4.0) == pytest.approx(200.0 + 600.0)


@pytest.mark.parametrize("raw_j", [None, 0.0])
def test_time_may_begin_at_zero(raw_j):
    counter = EnergyCounter()
    assert counter.joules(5.0) == 0.0
    counter.sample(0.0, 100.0, raw_j)
    counter.sample(1.0, 100.0, None if raw_j is None else 100.0)
    assert counter.joules(1.0) == pytest.approx(100.0)


@given(st.lists(st.tuples(st.floats(0.001, 0.5), st.floats(0, 500), st.floats(0, 100), st.booleans()), max_size=40))
def test_it_never_falls(steps):
    counter, at_s, raw_j, reported = EnergyCounter(), 1.0, 1000.0, [0.0]
    for seconds, watts, joules, restarts in steps:
        at_s += seconds
        raw_j = 0.0 if restarts else raw_j + joules
        counter.sample(at_s, watts, raw_j)
        reported += [counter.joules(at_s), counter.joules(at_s + seconds / 2)]
    assert reported == sorted(reported)


def run(counter, seconds, *, watts=200.0, counter_w=200.0, from_s=0.0):
    """Sample every 50 ms; the counter is refreshed every 100 ms."""
    for tick in range(round(seconds / 0.05) + 1):
        at_s = from_s + tick * 0.05
        counter.sample(at_s, watts, None if counter_w is None else counter_w * (tick // 2 * 0.1))
        counter.joules(at_s)


@pytest.mark.parametrize(("counter_w", "why"), [(360.0, "1.8 times"), (0.0, "stands still"), (100.0, "0.5 times")])
def test_a_counter_that_contradicts_the_watts_is_given_up(counter_w, why):
    counter = EnergyCounter()
    run(counter, 60.0, counter_w=counter_w)
    assert why in counter.trouble and "integrated" in counter.trouble
    assert counter.joules(60.0) == pytest.approx(200.0 * 60.0, rel=0.01)


@pytest.mark.parametrize("counter_w", [170.0, 240.0])
def test_a_counter_that_differs_as_readings_do_is_kept(counter_w):
    counter = EnergyCounter()
    run(counter, 60.0, counter_w=counter_w)
    assert counter.trouble is None
    assert counter.joules(60.0) == pytest.approx(counter_w * 60.0, rel=0.01)


def test_one_odd_comparison_is_not_enough():
    counter = EnergyCounter()
    run(counter, COMPARED_S, counter_w=400.0)
    run(counter, 2 * COMPARED_S, from_s=COMPARED_S + 0.05)
    assert counter.trouble is None


def test_without_a_power_reading_watts_are_the_slope_of_the_counter():
    counter = EnergyCounter()
    counter.sample(0.0, None, 5000.0)
    assert counter.watts is None
    run(counter, 2.0, watts=None, counter_w=150.0, from_s=0.1)
    assert counter.watts == pytest.approx(150.0)
    assert counter.joules(2.1) == pytest.approx(300.0, abs=16.0)
