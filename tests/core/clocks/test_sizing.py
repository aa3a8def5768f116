"""Which size, and when: rate, cover, grace."""

import pytest

from throttllem.core.clocks.sizing import AutoscaleOptions, Autoscaler


def scaler(**changes):
    whole = {"capacity_rps": {1: 1.0, 2: 2.0, 4: 5.0}, "interval_s": 10.0, "window_s": 20.0, "grace_s": 60.0}
    return Autoscaler(options=AutoscaleOptions(**whole | {"headroom": 1.0} | changes))


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


def test_a_request_counts_as_often_as_it_has_sequences():
    found = scaler()
    found.arrived(1.0, 10)
    assert found.rate_rps(1.0) == pytest.approx(1.0)


def test_the_rate_of_the_first_seconds_is_over_one_interval_at_least():
    found = scaler()
    for _ in range(10):
        found.arrived(1.0)
    assert found.rate_rps(1.0) == pytest.approx(1.0)
    assert found.rate_rps(15.0) == pytest.approx(10 / 14)


def test_grace_forbids_smaller_and_allows_larger():
    slow, fast = fed(0.5), fed(4.0)
    slow.changed(50.0)
    fast.changed(50.0)
    assert slow.wanted(100.0, 2) == 2
    assert fast.wanted(100.0, 2) == 4
    assert slow.wanted(109.9, 2) == 2
    assert slow.wanted(110.0, 2) == 1


def test_the_first_arrival_begins_a_grace_period():
    found = scaler()
    assert found.wanted(0.0, 4) == 4
    found.arrived(10.0)
    assert found.wanted(69.9, 4) == 4
    assert found.wanted(70.0, 4) == 1


def test_a_smaller_size_must_have_borne_the_busiest_moment_of_the_grace_period():
    found = scaler()
    found.arrived(1.0)
    for _ in range(30):
        found.arrived(99.0)
    # 1.5 requests per second over 20 s call for size 2, and count for 60 s after they were measured last (at 110 s).
    wanted = {now_s: found.wanted(now_s, 4) for now_s in map(float, range(100, 190, 10))}
    assert wanted == {now_s: 2 if now_s < 170 else 1 for now_s in wanted}


@pytest.mark.parametrize(
    ("rate", "engines"),
    [
        (0.1, {1: 1}),
        (1.2, {2: 1}),
        (5.0, {4: 1}),
        (5.9, {4: 1, 1: 1}),
        (11.5, {4: 2, 2: 1}),
        (14.0, {4: 3}),
        (99.0, {4: 3, 2: 1}),
    ],
)
def test_a_pool_has_as_many_of_the_largest_as_the_rate_fills_and_one_for_the_rest(rate, engines):
    found = fed(rate)
    assert found.wanted_engines(100.0, {4: 3}, 14) == engines


def test_a_pool_shrinks_only_after_the_grace_period():
    found = fed(2.0)
    found.changed(50.0)
    assert found.wanted_engines(100.0, {4: 3}, 14) == {4: 3}
    assert found.wanted_engines(111.0, {4: 3}, 14) == {2: 1}
