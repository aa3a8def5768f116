"""Samples: exact while there are few, within half a per cent in bounded memory when there are many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from throttllem.sim import samples
from throttllem.sim.samples import Samples, quantiles

TIMES = st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(1e-8, 9e5)), st.integers(1, 9)), min_size=1, max_size=60)


def measured(pairs):
    found = Samples()
    for value, times in pairs:
        found.add(value, times)
    return found


@given(TIMES, st.integers(2, 9))
@settings(max_examples=60)
def test_many_values_are_within_half_a_per_cent(pairs, most):
    values, times = np.array([value for value, _ in pairs]), np.array([times for _, times in pairs])
    right = quantiles(values, times)
    assert measured(pairs).quantiles() == right
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "MOST_VALUES", most)
        found = measured(pairs)
        assert found.exact == (len(pairs) < most)
        assert found.quantiles().mean == pytest.approx(right.mean, rel=1e-9)
        for name in ("p50", "p90", "p99"):
            assert getattr(found.quantiles(), name) == pytest.approx(getattr(right, name), rel=0.005)
        assert found.points()[1].sum() == times.sum()


def test_a_long_sample_is_drawn_from_few_points(monkeypatch):
    monkeypatch.setattr(samples, "MOST_VALUES", 1000)
    found = measured((value, 1) for value in np.random.default_rng(1).exponential(2.0, 50_000).tolist())
    drawn = found.spread(500)
    assert len(drawn) == 500 and drawn == sorted(drawn)
    assert np.median(drawn) == pytest.approx(2 * np.log(2), rel=0.03)
    assert found.points()[0].size < 8000


def test_nothing_measured_is_no_figure():
    assert Samples().quantiles().p99 is None and Samples().spread() == []


@given(TIMES, st.integers(2, 9))
def test_values_counted_together_are_values_counted_one_by_one(pairs, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "MOST_VALUES", most)
        together = Samples()
        for part in (pairs[:3], pairs[3:]):
            values = np.array([value for value, _ in part], dtype=np.float64)
            together.extend(values, np.array([times for _, times in part], dtype=np.int64))
        assert together.quantiles() == measured(pairs).quantiles()
        assert together.spread(50) == measured(pairs).spread(50)
