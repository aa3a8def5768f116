from __future__ import annotations

import pytest

from throttllem.report.distributions import MOST_POINTS, counted_curve, curve


def test_a_curve_is_thinned_and_keeps_its_ends() -> None:
    values, shares = curve([float(value) for value in range(10_000, 0, -1)])
    assert len(values) <= MOST_POINTS
    assert (values[0], shares[0]) == (1.0, 0.01)
    assert (values[-1], shares[-1]) == (10_000.0, 100.0)
    for value, share in zip(values, shares, strict=True):
        assert share == pytest.approx(value / 100)


def test_a_short_curve_is_whole_and_an_empty_one_is_empty() -> None:
    assert curve([3.0, 1.0, 2.0, 2.0]) == ([1.0, 2.0, 2.0, 3.0], [25.0, 50.0, 75.0, 100.0])
    assert curve([]) == ([], [])


def test_a_histogram_becomes_the_curve_at_its_upper_edges() -> None:
    assert counted_curve([0, 1, 2, 3, 4, 5], [0, 0, 1, 3, 0]) == ([2, 3, 4], [0, 25, 100])
    assert counted_curve([0, 1], [0]) == ([], [])
    values, shares = counted_curve([float(edge) for edge in range(2001)], [1] * 2000)
    assert len(values) <= MOST_POINTS
    assert (values[-1], shares[-1]) == (2000.0, 100.0)
