from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from throttllem.calibrate.bands import bands


def test_few_values_are_their_own_bands():
    assert bands([5, 3, 5, 9], most=4) == {3: 0, 5: 1, 9: 2}


def test_many_values_go_with_their_neighbours():
    assert bands(list(range(10)), most=3) == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 2, 8: 2, 9: 2}


def test_a_value_seen_too_rarely_joins_its_neighbour():
    assert bands([1, 1, 2, 3, 3, 4], most=9, fewest=2) == {1: 0, 2: 1, 3: 1, 4: 1}


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 8), st.integers(1, 8))
def test_bands_are_in_order_and_large_enough(values, most, fewest):
    found = bands(values, most, fewest)
    assert set(found) == set(values)
    assert [found[value] for value in sorted(found)] == sorted(found.values())
    sizes = Counter(found[value] for value in values)
    assert set(sizes) == set(range(len(sizes))) and len(sizes) <= most
    assert min(sizes.values()) >= min(fewest, len(values))
