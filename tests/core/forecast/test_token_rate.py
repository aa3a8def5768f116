import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.forecast.token_rate import TokenRate


def test_follows_what_the_engine_gives_and_falls_at_once():
    rate = TokenRate()
    assert rate.low == 1.0
    for _ in range(500):
        rate.learn(33, 10)
    assert rate.low == pytest.approx(3.3)
    for _ in range(32):  # a text of which nothing is drafted right
        rate.learn(10, 10)
    assert rate.low < 1.4
    for _ in range(16):  # deadlines count on more only once it lasts
        rate.learn(33, 10)
    assert rate.low < 2.7


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50))
def test_is_exactly_one_without_speculation(sequences):
    rate = TokenRate()
    for each in sequences:
        rate.learn(each, each)
    assert rate.low == 1.0


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (3, 4), (10**6, 1), (5, -1)])
def test_counts_that_make_no_sense_teach_nothing(tokens, sequences):
    rate = TokenRate()
    rate.learn(tokens, sequences)
    assert rate.low == 1.0
