"""Which size, and when: rate, cover, grace."""

import pytest

from throttllem.core.autoscale import AutoscaleOptions, Autoscaler


def scaler(**changes):
    whole = {"capacity_rps": {1: 1.0, 2: 2.0, 4: 5.0}, "interval_s": 10.0, "window_s": 20.0, "grace_s": 60.0}
    return Autoscaler(AutoscaleOptions(**whole | {"headroom": 1.0} | changes))


def fed(rate, until_s=100.0, **changes):
    found = scaler(**changes)
    for n in range(1, round(until_s * rate) + 1):
        found.arrived(n / rate)
    return found


@pytest.mark.parametrize(
    ("rate", "size"), [(0.1, 1), (0.9, 1), (1.0, 1), (1.2, 2), (2.0, 2), (2.1, 4), (5.0, 4), (50.0, 4)]
)
def test_the_smallest_size_that_covers_the_rate(rate, size):
    assert fed(rate).wanted(100.0, 2) == size


def test_headroom_leaves_a_part_of_the_maximum_unused():
    assert fed(0.95).wanted(100.0, 2) == 1
    assert fed(0.95, headroom=0.9).wanted(100.0, 2) == 2


def test_the_rate_is_that_of_the_window():
    found = fed(2.0)
    assert found.rate_rps(100.0) == pytest.approx(2.0)
    # Half of the window's arrivals are gone 10 s later, all of them after 20 s.
    assert found.rate_rps(110.0) == pytest.approx(1.0)
    assert found.rate_rps(120.0) == 0.0


def test_the_rate_of_the_first_seconds_is_over_one_interval_at_least():
    found = scaler()
    for _ in range(10):
        found.arrived(1.0)
    assert found.rate_rps(1.0) == pytest.approx(1.0)
    assert found.rate_rps(15.0) == pytest.approx(10 / 15)


def test_grace_forbids_smaller_and_allows_larger():
    slow, fast = fed(0.5), fed(4.0)
    slow.changed(50.0)
    fast.changed(50.0)
    assert slow.wanted(100.0, 2) == 2
    assert fast.wanted(100.0, 2) == 4
    assert slow.wanted(109.9, 2) == 2
    assert slow.wanted(110.0, 2) == 1


def test_no_change_yet_no_grace():
    assert fed(0.5).wanted(100.0, 4) == 1
