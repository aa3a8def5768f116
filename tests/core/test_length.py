"""Predictors: the asked error is the error given, whoever asks, in whatever order."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.toy import request
from throttllem.core.lengths.prediction import MaxTokens, Noisy, Oracle, expected_tokens, predicted_tokens

ANSWER = 1_000_000


def errors(p95_error, seed=0, ids=range(20_000)):
    noisy = Noisy(p95_error=p95_error, seed=seed)
    return np.array([noisy.predict(request(key, 10, ANSWER)) / ANSWER - 1.0 for key in ids])


@pytest.mark.parametrize("p95_error", [0.1, 0.3, 0.6])
def test_the_95th_percentile_of_the_error_is_the_one_asked_for(p95_error):
    found = errors(p95_error)
    # 20,000 draws: the standard error of this quantile is about 1 %.
    assert np.quantile(np.abs(found), 0.95) == pytest.approx(p95_error, rel=0.03)
    assert abs(found.mean()) < 0.02 * p95_error
    assert np.mean(found > 0) == pytest.approx(0.5, abs=0.015)


def test_neighbouring_requests_and_seeds_err_independently():
    found = errors(0.3)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(found, errors(0.3, seed=1))[0, 1]) < 0.03


def test_the_error_depends_on_seed_and_id_alone():
    backwards = errors(0.3, ids=range(99, -1, -1))[::-1]
    np.testing.assert_array_equal(errors(0.3, ids=range(100)), backwards)


def test_no_error_is_the_oracle():
    assert set(errors(0.0, ids=range(50))) == {0.0}


@pytest.mark.parametrize("p95_error", [-0.1, 1.0, math.nan])
def test_an_impossible_error_is_refused(p95_error):
    with pytest.raises(ValueError, match="length error = "):
        Noisy(p95_error=p95_error)


def test_who_cannot_say_falls_back_to_max_tokens():
    unknown = request(1, 10, 5, output_tokens=None, max_tokens=77)
    for predictor in (Oracle(), Noisy(p95_error=0.3), MaxTokens()):
        assert predicted_tokens(predictor, unknown, 1.0) == 77
    assert predicted_tokens(MaxTokens(), request(1, 10, 5, max_tokens=77), 1.0) == 77
    assert predicted_tokens(Oracle(), request(1, 10, 5, max_tokens=77), 1.0) == 5


class Says:
    def __init__(self, guess):
        self.guess = guess

    def predict(self, request):
        return self.guess


@pytest.mark.parametrize(
    ("guess", "inflation", "tokens"),
    [
        (10, 1.0, 10),
        (10, 1.25, 13),
        (10.1, 1.0, 11),
        (-4.0, 1.0, 1),
        (0.0, 2.0, 1),
        (90, 2.0, 100),
        (math.nan, 1.0, 100),
        (math.inf, 1.0, 100),
        (None, 1.0, 100),
    ],
)
def test_inflation_and_clipping(guess, inflation, tokens):
    assert predicted_tokens(Says(guess), request(1, 10, 5, max_tokens=100), inflation) == tokens


class Bounds(Says):
    """Says `guess`, and bounds the answer."""

    def __init__(self, guess, most):
        super().__init__(guess)
        self.most = most

    def bound(self, request):
        return self.most

    def forget(self, request):
        pass


@pytest.mark.parametrize(
    ("guess", "most", "tokens", "sure"),
    [
        (10.2, 40.5, 41, 11),
        (10.0, 400.0, 100, 10),
        (10.0, None, 100, 10),
        (None, None, 100, 100),
        (None, 40.0, 40, 40),
        (60.0, 40.0, 40, 40),
        (0.2, 0.1, 1, 1),
        (math.nan, math.inf, 100, 100),
    ],
)
def test_a_bound_is_not_inflated(guess, most, tokens, sure):
    asked = request(1, 10, 5, max_tokens=100)
    assert predicted_tokens(Bounds(guess, most), asked, 3.0) == tokens
    assert expected_tokens(Bounds(guess, most), asked, tokens, 3.0) == sure


def test_what_inflation_added_is_not_sure():
    asked = request(1, 10, 5, max_tokens=100)
    assert expected_tokens(Says(10), asked, predicted_tokens(Says(10), asked, 1.5), 1.5) == 10
    assert expected_tokens(Says(10), asked, predicted_tokens(Says(10), asked, 0.5), 0.5) == 5


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_every_id_and_seed_gives_a_usable_prediction(seed, key):
    predicted = predicted_tokens(Noisy(p95_error=0.99, seed=seed), request(key, 10, 50, max_tokens=60), 1.0)
    assert 1 <= predicted <= 60
