"""Predictors, and the controller's use of them: inflated, clipped, learned from what ended, renewed, scored."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.stories import SIZES, arrive, options, world
from core.toy import request
from throttllem.core.controller import Controller
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.lengths.prediction import (
    LengthPredictor,
    LengthScore,
    MaxTokens,
    Noisy,
    Oracle,
    Prediction,
)
from throttllem.core.scoreboard import SequenceState
from throttllem.core.types import Arrived, EngineReady, Stepped

OUTPUT = 1_000_000


def errors(p95_error, seed=0, ids=range(20_000)):
    noisy = Noisy(p95_error=p95_error, seed=seed)
    return np.array([noisy.predict(request(key, 10, OUTPUT)).expected_tokens / OUTPUT - 1.0 for key in ids])


@pytest.mark.parametrize("p95_error", [0.1, 0.3, 0.6])
def test_the_95th_percentile_of_the_error_is_the_option(p95_error):
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


class Fixed(LengthPredictor):
    """One prediction for all; writes down what it is given."""

    def __init__(self, prediction, renewed=None):
        self.prediction = prediction
        self.renewed = renewed
        self.learned, self.forgotten, self.outgrown = [], [], []

    def predict(self, request):
        return self.prediction

    def renew(self, request, generated_tokens):
        self.outgrown.append((request.id, generated_tokens))
        return self.renewed

    def learn(self, request, output_tokens):
        self.learned.append((request.id, output_tokens))

    def forget(self, request):
        self.forgotten.append(request.id)


def bounded(renewed=None):
    return Fixed(Prediction(6, 9), renewed)


def used(predictor, inflation=1.0, **changes):
    """What the controller plans with: predicted and expected tokens."""
    asked = request(1, 10, 5, **{"max_tokens": 100} | changes)
    found = SequenceState.planned(asked, predictor.predict(asked), inflation)
    assert found.output_tokens == found.predicted_tokens
    return found.predicted_tokens, found.expected_tokens


def test_without_a_prediction_max_tokens_stands_in():
    for predictor in (Oracle(), Noisy(p95_error=0.3), MaxTokens()):
        assert used(predictor, output_tokens=None, max_tokens=77) == (77, 77)
    assert used(MaxTokens(), max_tokens=77) == (77, 77)
    assert used(Oracle(), max_tokens=77) == (5, 5)


@pytest.mark.parametrize(
    ("tokens", "inflation", "predicted"),
    [
        (10, 1.0, 10),
        (10, 1.25, 13),
        (10.1, 1.0, 11),
        (-4.0, 1.0, 1),
        (0.0, 2.0, 1),
        (90, 2.0, 100),
        (math.nan, 1.0, 100),
        (math.inf, 1.0, 100),
    ],
)
def test_inflation_and_clipping(tokens, inflation, predicted):
    assert used(Fixed(Prediction(tokens)), inflation)[0] == predicted


@pytest.mark.parametrize(
    ("tokens", "bound", "predicted", "expected"),
    [
        (10.2, 40.5, 41, 11),
        (10.0, 400.0, 100, 10),
        (60.0, 40.0, 40, 40),
        (0.2, 0.1, 1, 1),
        (math.nan, math.inf, 100, 100),
    ],
)
def test_a_bound_is_not_inflated(tokens, bound, predicted, expected):
    assert used(Fixed(Prediction(tokens, bound)), 3.0) == (predicted, expected)
    assert used(Fixed(None), 3.0) == (100, 100)


def test_what_inflation_added_is_not_expected():
    assert used(Fixed(Prediction(10)), 1.5) == (15, 10)
    assert used(Fixed(Prediction(10)), 0.5) == (5, 5)


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_every_id_and_seed_gives_a_usable_prediction(seed, key):
    asked = request(key, 10, 50, max_tokens=60)
    prediction = Noisy(p95_error=0.99, seed=seed).predict(asked)
    assert 1 <= SequenceState.planned(asked, prediction, 1.0).predicted_tokens <= 60


def test_the_score():
    score = LengthScore()
    for tokens in (6, 9, 10, 2):
        score = score.with_output(tokens, predicted_tokens=9, expected_tokens=6)
    assert score == LengthScore(seen=4, exceeded=1, error_tokens=0 + 3 + 4 + 4)


@pytest.mark.parametrize("predictor", [Oracle(), MaxTokens()])
def test_predictors_that_never_learn(predictor):
    asked = request(1, 4, 7)
    before = predictor.predict(asked)
    predictor.learn(asked, 9)
    predictor.forget(asked)
    assert predictor.renew(asked, 9) is None
    assert predictor.predict(asked) == before


# ---- through the controller ----------------------------------------------------------------------------------


def world_with(predictor, **changes):
    made = world(options(**changes))
    # The world gives each controller a copy; here the test wants to read along.
    made.controller._predictor = predictor
    return made


def test_finished_requests_are_learned_and_others_forgotten():
    predictor = bounded()
    live = world_with(predictor)
    arrive(live, 1, 4, 7, max_tokens=9)
    arrive(live, 2, 4, 8, sequences=2)
    for _ in range(3):
        live.end_iteration(0)
    arrive(live, 3)
    live.cancel(3)
    while live.on:
        live.end_iteration(0)
    assert sorted(predictor.learned) == [(1, 7), (2, 8)], "tokens of one sequence"
    assert predictor.forgotten == [3]
    arrive(live, 4)
    live.lose(0)
    assert predictor.forgotten == [3, 4]
    arrive(live, 5)
    live.cancel(5)
    assert predictor.forgotten == [3, 4, 5], "in the queue too"
    assert live.controller.snapshot().lengths == LengthScore(seen=2, exceeded=0, error_tokens=1 + 2)


def test_an_outgrown_prediction_is_renewed():
    predictor = bounded(renewed=14.2)
    live = world_with(predictor)
    arrive(live, 1, 4, 20, max_tokens=40)
    for _ in range(8):
        live.end_iteration(0)
    assert predictor.outgrown == []
    live.end_iteration(0)
    assert predictor.outgrown == [(1, 9)]
    assert live.controller.projection(0).ends.tolist() == [15 - 9]
    live.run_out(SIZES.get)
    assert live.controller.snapshot().lengths == LengthScore(seen=1, exceeded=1, error_tokens=14)


def test_the_online_predictor_through_the_controller():
    """A hundred outputs of 8 tokens where 60 are allowed: after the first few none is planned with 60."""
    live = world(options(predictor=OnlineLengthPredictor(OnlineLengthOptions())))
    for key in range(100):
        arrive(live, key, 4, 8, max_tokens=60)
        live.run_out(SIZES.get)
    arrive(live, 100, 4, 8, max_tokens=60)
    (ends,) = live.controller.projection(0).ends.tolist()
    assert 8 <= ends <= 12
    score = live.controller.snapshot().lengths
    assert (score.seen, score.exceeded) == (100, 0)
    assert score.error_tokens < 100 * 10, "only the first few were predicted at 60"


def test_an_output_without_tokens_teaches_nothing():
    predictor = bounded()
    controller = Controller(options(predictor=predictor))
    controller.handle(EngineReady(engine=0, spec=SIZES[1]), 0.0)
    controller.handle(Arrived(request=request(1, 4, 8)), 0.0)
    controller.handle(Stepped(engine=0, iteration=0, finished=(1,)), 0.1)
    assert (predictor.learned, predictor.forgotten) == ([], [1])
    assert controller.snapshot().lengths == LengthScore()
