"""Predictions on their way through the controller: learned from what ended, renewed where outgrown, scored."""

import math

import pytest

from core.stories import SIZES, arrive, options, world
from core.toy import request, row
from throttllem.core.lengths.expectation import LengthPrediction
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.lengths.prediction import LengthScore, MaxTokens, Oracle, Unlearning
from throttllem.core.scoreboard import Scoreboard


class Diary(Unlearning):
    """Bounds every answer by 9, expects 6, and writes down what it is told."""

    def __init__(self, renewed=None):
        self.renewed = renewed
        self.learned = []
        self.forgotten = []
        self.asked = []

    def predict(self, request):
        return 6

    def bound(self, request):
        return 9

    def learn(self, request, output_tokens):
        self.learned.append((request.id, output_tokens))

    def forget(self, request):
        self.forgotten.append(request.id)

    def renew(self, request, generated_tokens):
        self.asked.append((request.id, generated_tokens))
        return self.renewed


def test_a_bound_stands_in_the_place_of_inflation():
    made = LengthPrediction(Diary(), 3.0).row(request(1, 4, 20))
    assert (made.predicted_tokens, made.output_tokens, made.expected_tokens) == (9, 9, 6)
    short = LengthPrediction(Diary(), 1.0).row(request(1, 4, 5))
    assert (short.predicted_tokens, short.expected_tokens) == (5, 5)


def test_the_score():
    diary = Diary()
    foresight = LengthPrediction(diary, 1.0)
    for key, tokens in enumerate((6, 9, 10, 2, 0)):
        foresight.finished(foresight.row(request(key, 4, 20)), tokens)
    assert foresight.score == LengthScore(seen=4, exceeded=1, error_tokens=0 + 3 + 4 + 4)
    assert diary.learned == [(0, 6), (1, 9), (2, 10), (3, 2)]
    assert diary.forgotten == [4], "no token was told: nothing is known of this answer"


def told_by(diary, **changes):
    made = world(options(**changes))
    # The world gives each controller a copy; here the test wants to read along.
    made.controller._lengths._predictor = diary
    return made


def test_finished_requests_are_learned_and_others_forgotten():
    diary = Diary()
    told = told_by(diary)
    arrive(told, 1, 4, 7, max_tokens=9)
    arrive(told, 2, 4, 8, sequences=2)
    for _ in range(3):
        told.end_iteration(0)
    arrive(told, 3)
    told.cancel(3)
    while told.on:
        told.end_iteration(0)
    assert sorted(diary.learned) == [(1, 7), (2, 8)], "tokens of one sequence"
    assert diary.forgotten == [3]
    arrive(told, 4)
    told.lose(0)
    assert diary.forgotten == [3, 4]
    arrive(told, 5)
    told.cancel(5)
    assert diary.forgotten == [3, 4, 5], "in the queue too"
    assert told.controller.snapshot().lengths == LengthScore(seen=2, exceeded=0, error_tokens=1 + 2)


def test_the_predictor_is_asked_again_for_an_answer_that_outgrew_it():
    diary = Diary(renewed=14.2)
    told = told_by(diary)
    arrive(told, 1, 4, 20, max_tokens=40)
    for _ in range(8):
        told.end_iteration(0)
    assert diary.asked == []
    told.end_iteration(0)
    assert diary.asked == [(1, 9)]
    assert told.controller.projection(0).ends.tolist() == [15 - 9]
    told.run_out(SIZES.get)
    assert told.controller.snapshot().lengths == LengthScore(seen=1, exceeded=1, error_tokens=14)


@pytest.mark.parametrize(
    ("renewed", "answer"),
    [(None, 20), (math.nan, 20), (math.inf, 20), (12.3, 13), (99.0, 20), (1.0, 6), (5.0, 6)],
)
def test_what_a_renewed_prediction_may_be(renewed, answer):
    board = Scoreboard(4)
    board.dispatch(row(1, 4, 5, max_tokens=20))
    board.begin(1, 0, 0.0)
    assert [found.output_tokens for found in board.outgrown(5, lambda request, generated: renewed)] == [answer]


def test_beyond_max_tokens_nobody_is_asked():
    board = Scoreboard(4)
    board.dispatch(row(1, 4, 5, max_tokens=5))
    board.begin(1, 0, 0.0)

    def renew(request, generated):
        raise AssertionError("it knows no better than the engine")

    assert [found.output_tokens for found in board.outgrown(5, renew)] == [6]


@pytest.mark.parametrize("predictor", [Oracle(), MaxTokens()])
def test_predictors_that_never_learn(predictor):
    foresight = LengthPrediction(predictor, 1.0)
    made = foresight.row(request(1, 4, 7))
    foresight.finished(made, 9)
    foresight.dropped(made)
    assert foresight.renew(made.request, 9) is None
    assert foresight.score == LengthScore(seen=1, exceeded=1, error_tokens=2)


def test_the_online_predictor_through_the_controller():
    """A hundred answers of 8 tokens where 60 are allowed: from the first few on nobody is planned with 60."""
    told = world(options(predictor=OnlineLengthPredictor(OnlineLengthOptions())))
    for key in range(100):
        arrive(told, key, 4, 8, max_tokens=60)
        told.run_out(SIZES.get)
    arrive(told, 100, 4, 8, max_tokens=60)
    (ends,) = told.controller.projection(0).ends.tolist()
    assert 8 <= ends <= 12
    score = told.controller.snapshot().lengths
    assert (score.seen, score.exceeded) == (100, 0)
    assert score.error_tokens < 100 * 10, "only the first few were taken for 60"
