"""The engines of least watts, against every plan there is."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clocks.test_size_planner import LIMITS, SIZES, SPECS, load
from throttllem.core.clocks.cost_curve import cost_curve
from throttllem.core.pool.plan import Prices, cheapest

CURVES = {tp: cost_curve(load(10.0), SIZES.tables[tp], SPECS[tp], LIMITS) for tp in SPECS}
PRICES = Prices(curves=CURVES, free_w=20.0)


def every_plan(gpus, least):
    ranges = [range(least.get(tp, 0), gpus // tp + 1) for tp in SPECS]
    for counts in product(*ranges):
        plan = {tp: count for tp, count in zip(SPECS, counts, strict=True) if count}
        if plan and sum(tp * count for tp, count in plan.items()) <= gpus:
            yield plan


@given(
    rate_rps=st.floats(0.0, 300.0),
    spare=st.floats(0.0, 1.5),
    gpus=st.integers(1, 7),
    least=st.sampled_from([{}, {1: 1}, {2: 1}, {1: 2, 2: 1}]),
)
def test_no_plan_draws_less(rate_rps, spare, gpus, least):
    plans = list(every_plan(gpus, least))
    if not plans:
        return
    needed_rps = rate_rps * spare
    found = cheapest(PRICES, rate_rps, gpus, needed_rps=needed_rps, least=least)
    enough = [plan for plan in plans if PRICES.holds_rps(plan) >= needed_rps]
    assert found in plans
    if enough:
        assert PRICES.holds_rps(found) >= needed_rps
        assert PRICES.watts(found, rate_rps, gpus) <= min(PRICES.watts(plan, rate_rps, gpus) for plan in enough) + 1e-6
    else:
        assert PRICES.holds_rps(found) == pytest.approx(max(map(PRICES.holds_rps, plans)))


def test_many_engines_run_at_the_rate_at_which_a_request_is_cheapest():
    found = cheapest(PRICES, 2000.0, 1000, needed_rps=2200.0, least={})
    assert PRICES.watts(found, 2000.0, 1000) < min(PRICES.watts({tp: 1000 // tp}, 2000.0, 1000) for tp in SPECS)
    assert sum(tp * count for tp, count in found.items()) <= 1000
