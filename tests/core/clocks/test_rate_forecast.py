"""The forecast of the request rate: level, learned errors, and the profile of a day."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.clocks.rate_forecast import SLOTS, RateForecast


def forecast(**changes):
    whole = {"interval_s": 10.0, "lead": 3, "day_s": 86400.0, "offset_s": 0.0}
    return RateForecast(**whole | changes)


def fed(rates, **changes):
    """As many requests in each interval of 10 s as its rate says, evenly."""
    found = forecast(**changes)
    found.advance(0.0)
    for n, rate in enumerate(rates):
        count = round(10 * rate)
        for k in range(count):
            found.arrived(10 * n + 10 * k / count, 1)
    found.advance(10.0 * len(rates))
    return found


def test_a_steady_rate_is_forecast_as_it_is():
    found = fed([3.0] * 60)
    assert found.rate_rps() == pytest.approx(3.0)
    assert found.ratios == pytest.approx([1.0] * 52)


def test_nothing_is_expected_before_the_first_interval_is_over():
    found = forecast()
    found.arrived(5.0, 1)
    assert found.rate_rps() == 0.0
    assert not found.coming_rps().any()


def test_a_request_counts_as_often_as_it_has_sequences():
    found = forecast()
    found.arrived(0.0, 30)
    found.advance(10.0)
    assert found.rate_rps() == pytest.approx(3.0)


def test_a_young_forecast_holds_a_doubling_possible():
    assert fed([3.0] * 2).coming_rps() == pytest.approx([1.5, 3.0, 6.0])


def test_what_came_and_was_not_forecast_is_held_possible_again():
    bursty = fed(([3.0] * 9 + [9.0] * 3) * 10)
    assert (fed([3.0] * 120).coming_rps() > 6.1).sum() == 0
    assert (bursty.coming_rps() > 2.1 * bursty.rate_rps()).sum() > 5


@given(st.lists(st.integers(0, 50), min_size=9, max_size=40))
def test_every_ratio_is_of_what_came_to_what_was_forecast(counts):
    """The first forecast of 3 intervals is made after 6, a minute: a younger level is not judged."""
    found = fed([count / 10 for count in counts])
    level = np.average(counts[:6], weights=np.exp(-np.arange(6)[::-1] / 6))
    assert found.ratios[0] == pytest.approx((sum(counts[6:9]) + 0.5) / (3 * level + 0.5))
    assert len(found.ratios) == len(counts) - 8


def test_a_slow_start_is_not_held_possible_for_hours():
    found = fed([0.1, *([5.0] * 60)])
    assert max(found.ratios) < 1.5


def test_the_profile_is_the_mean_course_of_the_last_days():
    day_s = 10.0 * SLOTS * 2
    day = [2.0] * SLOTS + [4.0] * SLOTS
    found = fed(day * 2, day_s=day_s)
    known = np.array(found.profile_rps)
    assert known[5:70] == pytest.approx(2.0)
    assert known[75:140] == pytest.approx(4.0)


def test_the_profile_moves_the_level():
    """At the end of the low half of a day that is known, twice the rate is expected."""
    day_s = 10.0 * SLOTS * 2
    day = [2.0] * SLOTS + [4.0] * SLOTS
    found = fed(day * 2 + day[:SLOTS], day_s=day_s)
    assert found.rate_rps() == pytest.approx(2.0)
    ahead = found.ahead_rps(10)
    assert ahead is not None
    assert ahead[-1] == pytest.approx(4.0, rel=0.05)


def test_no_course_is_known_on_the_first_day():
    assert fed([2.0] * 50).ahead_rps(3) is None


def test_after_a_long_silence_it_starts_again():
    found = fed([5.0] * 10)
    found.advance(1e9)
    assert found.rate_rps() == 0.0
    assert len(found.forecasts) <= found.lead
