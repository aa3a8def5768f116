import json
import pickle

import pytest

from tests.core.answers import answers, request, serve
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor


def test_the_same_calls_give_the_same_answers_through_json_and_pickle() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, [*answers(300, 200, 27, caller="a"), *answers(300, 50, 28, caller="b", limit=64)])
    copies = [
        OnlineLengthPredictor.from_state(json.loads(json.dumps(predictor.state()))),
        pickle.loads(pickle.dumps(predictor)),
    ]
    more = [*answers(200, 300, 29, caller="a"), *answers(200, 60, 30, caller="c")]
    expected = [(predictor.predict(one), predictor.bound(one), predictor.renew(one, 50)) for one in more]
    for copy in copies:
        assert [(copy.predict(one), copy.bound(one), copy.renew(one, 50)) for one in more] == expected
        assert serve(copy, more) == serve(pickle.loads(pickle.dumps(predictor)), more)


def test_levels_of_another_exceed_start_anew() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, answers(400, 200, 31))
    fifth = OnlineLengthPredictor.from_state(predictor.state(), OnlineLengthOptions(exceed=0.2))
    assert all(group["level"] is None for group in fifth.state()["groups"])
    assert fifth.predict(request(0)) == predictor.predict(request(0))
    with pytest.raises(ValueError, match="version"):
        OnlineLengthPredictor.from_state({"version": 0, "groups": []})


def test_memory_is_bounded_and_the_busy_are_kept() -> None:
    predictor = OnlineLengthPredictor(OnlineLengthOptions(most_groups=40))
    regular = answers(200, 50, 32, caller="regular")
    serve(predictor, regular)
    for number in range(3000):
        stranger = request(number, caller=f"{number % 500}" + "x" * 10_000, prompt=number)
        predictor.bound(stranger)
        predictor.learn(stranger, 900)
        if number % 10 == 0:
            predictor.learn(regular[number % 200], 50)
    state = predictor.state()
    assert len(state["groups"]) <= 40
    assert max(len(str(group["key"])) for group in state["groups"]) < 200
    assert predictor.predict(request(0, caller="regular")) == pytest.approx(50, rel=0.1)


def test_bounds_of_requests_that_never_end_are_bounded_too() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, answers(50, 200, 33))
    for number in range(9000):
        predictor.bound(request(10_000 + number))
    assert len(pickle.dumps(predictor)) < 1_500_000


@pytest.mark.parametrize(
    "wrong",
    [{"exceed": 0.0}, {"exceed": 0.9}, {"memory_answers": 5}, {"rate": -1}, {"prior_answers": 0}, {"most_groups": 1}],
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"length\."):
        OnlineLengthOptions(**wrong)  # type: ignore[arg-type]


def test_a_copy_says_the_same_and_learns_no_more() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, answers(300, 200, 27))
    before, copied = predictor.state(), predictor.copy()
    serve(predictor, answers(5, 90, 28))
    assert copied.state() == before != predictor.state()
    assert list(predictor.groups()) == predictor.state()["groups"]
