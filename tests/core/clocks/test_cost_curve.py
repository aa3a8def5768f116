"""P*(rate): what it agrees with, and where it ends."""

import pytest

from core.toy import SPEC, spec, table
from throttllem.core.clocks.cost_curve import CostCurve, cost_curve
from throttllem.core.clocks.steady_load import Load, steady

LOAD = Load(requests_per_s=2.0, prompt_tokens=10.0, output_tokens=12.0, long_output_tokens=20.0, burst=1.2, e2e_s=4.0)


def curve(tp=1, load=LOAD, capacity_rps=4.0, **changes):
    some = spec(tp=tp, **changes)
    return cost_curve(load, table(some), some, capacity_rps=capacity_rps, reserve=0.05)


def test_it_is_the_cheapest_clock_of_the_steady_load():
    found = curve()
    at = steady(LOAD, table(SPEC), SPEC, reserve=0.05).watts.min()
    assert found.watts_at(2.0) == pytest.approx(at, rel=0.03)  # straight between two rates


def test_it_begins_with_the_idle_watts_and_rises():
    found = curve()
    assert found.watts_at(0.0) == SPEC.idle_w
    rates = [0.05 * n for n in range(100)]
    watts = [found.watts_at(rate) for rate in rates]
    assert watts == sorted(watts)


def test_a_size_holds_at_most_its_characterised_load():
    assert curve(capacity_rps=1.0).holds_rps == pytest.approx(1.0)
    assert curve(capacity_rps=1000.0).holds_rps < 1000.0


def test_a_size_that_is_too_slow_for_long_outputs_holds_nothing():
    slow = Load(
        requests_per_s=2.0, prompt_tokens=10.0, output_tokens=12.0, long_output_tokens=1e6, burst=1.2, e2e_s=4.0
    )
    found = curve(load=slow)
    assert found.holds_rps == 0.0
    assert found.watts_at(3.0) == SPEC.idle_w


def test_beyond_its_end_it_goes_on_straight():
    found = CostCurve(rates_rps=(0.0, 2.0), watts=(40.0, 100.0), holds_rps=2.0)
    assert found.watts_at(1.0) == pytest.approx(70.0)
    assert found.watts_at(4.0) == pytest.approx(200.0)
