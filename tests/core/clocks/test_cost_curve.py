"""P*(rate): where it begins and ends, and what it is made of."""

import math

import numpy as np
import pytest

from core.toy import SPEC, spec, table
from throttllem.core.clocks.cost_curve import CostCurve, Limits, cost_curve
from throttllem.core.clocks.request_chain import chain
from throttllem.core.clocks.steady_load import Load

LOAD = Load(requests_per_s=2.0, prompt_tokens=10.0, output_tokens=12.0, long_output_tokens=20.0, burst=1.2, e2e_s=4.0)
LIMITS = Limits(tbt_s=math.inf, ttft_s=math.inf, reserve=0.05)


def load(**changes):
    whole = {name: getattr(LOAD, name) for name in LOAD.__dataclass_fields__}
    return Load(**whole | changes)


def curve(tp=1, of=LOAD, limits=LIMITS):
    some = spec(tp=tp)
    return cost_curve(of, table(some), some, limits)


def test_it_begins_with_the_idle_watts_and_rises():
    found = curve()
    assert found.watts_at(0.0) == SPEC.idle_w
    watts = [found.watts_at(found.holds_rps * n / 50) for n in range(80)]
    assert watts == sorted(watts)


def test_watts_at_a_low_rate_are_idle_and_one_request_in_their_shares():
    """Hardly two requests meet: busy the fraction rate x seconds of one request, at its cheapest clock."""
    found = curve(of=load(e2e_s=None))
    rate = found.rates_rps[1]
    states = chain(LOAD, table(SPEC), SPEC)
    seconds, watts = 1.0 / states.leave_per_s[0], states.watts[0]
    cheapest = ((1.0 - rate * seconds) * SPEC.idle_w + rate * seconds * watts).min()
    assert found.watts_at(rate) == pytest.approx(cheapest, rel=0.05)


def test_the_rate_that_is_held_is_below_the_throughput():
    states = chain(LOAD, table(SPEC), SPEC)
    throughput = states.leave_per_s[-1].max()
    assert 0.5 * throughput < curve().holds_rps < throughput


def test_a_larger_engine_holds_more():
    assert curve(tp=2).holds_rps > 1.2 * curve(tp=1).holds_rps


def test_the_load_s_own_rate_does_not_matter():
    assert curve(of=load(requests_per_s=0.1)) == curve()


@pytest.mark.parametrize(
    ("of", "limits"),
    [(load(long_output_tokens=1e6), LIMITS), (LOAD, Limits(tbt_s=0.001, ttft_s=math.inf, reserve=0.05))],
    ids=["E2E", "TBT"],
)
def test_a_size_that_meets_no_slo_holds_only_what_was_characterised(of, limits):
    assert curve(of=of, limits=limits).holds_rps == 0.0
    assert cost_curve(of, table(SPEC), SPEC, limits, capacity_rps=3.0).holds_rps == 3.0
    assert curve(of=of, limits=limits).watts_at(3.0) > SPEC.idle_w


def test_a_size_without_room_for_two_requests_holds_nothing():
    found = cost_curve(load(prompt_tokens=10_000.0), table(SPEC), SPEC, LIMITS, capacity_rps=3.0)
    assert found == CostCurve(rates_rps=(0.0,), watts=(SPEC.idle_w,), holds_rps=0.0)
    assert found.watts_at(3.0) == SPEC.idle_w


def test_with_a_ttft_slo_no_request_may_have_to_wait_for_a_full_engine():
    loose = load(e2e_s=None)
    held = curve(of=loose).holds_rps
    assert curve(of=loose, limits=Limits(tbt_s=math.inf, ttft_s=1.0, reserve=0.05)).holds_rps < held


def test_beyond_its_end_it_goes_on_straight():
    found = CostCurve(rates_rps=(0.0, 2.0), watts=(40.0, 100.0), holds_rps=2.0)
    assert found.watts_at(1.0) == pytest.approx(70.0)
    assert found.watts_at(4.0) == pytest.approx(200.0)
    assert np.isfinite(found.watts_at(1e6))
