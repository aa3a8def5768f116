"""The online predictor: how rarely its bounds are exceeded, whatever clients send, and what it writes out."""

import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.lengths.outputs import bound, median, outputs, request, serve, worst
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor, bin_of, shortest_of
from throttllem.core.types import Request


@given(st.integers(0, (1 << 20) - 1))
def test_a_bin_holds_its_lengths(tokens: int) -> None:
    at = bin_of(tokens)
    assert shortest_of(at) <= tokens < shortest_of(at + 1)
    assert shortest_of(at + 1) - shortest_of(at) <= max(1, tokens / 8)


def test_longer_than_any_bin_is_in_the_last_but_one() -> None:
    assert bin_of(1 << 40) == bin_of((1 << 21) - 1) == bin_of((1 << 20) - 1)


@pytest.mark.parametrize(("exceed", "least"), [(0.1, 9), (0.05, 19), (0.2, 4), (0.01, 99)])
def test_without_evidence_it_predicts_nothing(exceed: float, least: int) -> None:
    predictor = OnlineLengthPredictor(OnlineLengthOptions(exceed=exceed))
    for number in range(least):
        assert median(predictor, request(number)) is None
        assert bound(predictor, request(number)) is None
        assert predictor.renew(request(number), 5) is None
        predictor.learn(request(number), 100)
    assert median(predictor, request(least)) is not None
    assert median(predictor, request(least, model="another")) is None


def test_the_first_bound_waits_for_enough_outputs() -> None:
    predictor = OnlineLengthPredictor(OnlineLengthOptions(start=1.0))
    for number in range(9):
        predictor.learn(request(number), 100)
    assert bound(predictor, request(0)) is None
    predictor.learn(request(9), 100)
    predictor.learn(request(10), 100)
    assert bound(predictor, request(0)) == pytest.approx(100, rel=0.1)


def test_the_median_is_near_and_the_bound_above_it() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, outputs(2000, 200, 1))
    assert median(predictor, request(0)) == pytest.approx(200, rel=0.1)
    assert bound(predictor, request(0)) == pytest.approx(200 * math.exp(0.6 * 1.2816), rel=0.25)


def test_it_is_careful_at_first() -> None:
    """The first outputs to end are the shortest of those that run, and there are few."""
    early = {0.25: 0, 1.0: 0}
    for start in early:
        for seed in range(40, 60):
            exceeded = serve(
                OnlineLengthPredictor(OnlineLengthOptions(start=start)), short_first(outputs(120, 200, seed)), lag=15
            )
            early[start] += sum(exceeded)
    assert early[0.25] / (20 * 120) < 0.1 < early[1.0] / (20 * 120)


def short_first(requests: list[Request]) -> list[Request]:
    """The shorter of each 30 come, and so end, before the longer."""
    return [
        one
        for at in range(0, len(requests), 30)
        for one in sorted(requests[at : at + 30], key=lambda r: r.output_tokens or 0)
    ]


def test_a_bound_for_one_output_in_two_hundred() -> None:
    predictor = OnlineLengthPredictor(OnlineLengthOptions(exceed=0.005))
    exceeded = serve(predictor, outputs(6000, 200, 19), lag=20)
    assert 8 <= sum(exceeded) <= 45
    assert 600 < (bound(predictor, request(0)) or 4096) < 4096
    assert OnlineLengthOptions(exceed=0.001).kept_answers == 5000


@pytest.mark.parametrize("exceed", [0.05, 0.1, 0.2])
def test_bounds_are_exceeded_as_often_as_the_option_says(exceed: float) -> None:
    exceeded = serve(OnlineLengthPredictor(OnlineLengthOptions(exceed=exceed)), outputs(4000, 200, 2), lag=20)
    assert sum(exceeded) / len(exceeded) == pytest.approx(exceed, abs=0.01)
    assert worst(exceeded, 1000) < exceed + 0.025


def test_it_holds_while_outputs_grow_and_shrink() -> None:
    drifting = [*outputs(1500, 100, 3), *outputs(1500, 400, 4), *outputs(1500, 50, 5), *outputs(1500, 150, 6)]
    exceeded = serve(OnlineLengthPredictor(), drifting, lag=20)
    assert 0.07 < sum(exceeded) / len(exceeded) < 0.11
    assert worst(exceeded, 1000) < 0.18
    # Without moving levels the memory alone forgets too late.
    still = serve(OnlineLengthPredictor(OnlineLengthOptions(rate=0.0, start=1.0)), drifting, lag=20)
    assert worst(still, 1000) > worst(exceeded, 1000) + 0.02


@given(st.lists(st.tuples(st.integers(1, 600), st.booleans()), min_size=50, max_size=250), st.sampled_from([0.1, 0.3]))
def test_no_order_of_outputs_exceeds_bounds_more_often_than_the_levels_allow(
    script: list[tuple[int, bool]], exceed: float
) -> None:
    """Where outputs are learned at once: each exceeded bound lowers the level, until none is exceeded."""
    options = OnlineLengthOptions(exceed=exceed, memory_answers=50, own_level_answers=10**6)
    predictor, exceeded = OnlineLengthPredictor(options), 0
    for number, (length, adversarial) in enumerate(script):
        top = int(bound(predictor, request(number)) or 4096)
        output = min(top + length, 4096) if adversarial else min(length, top)
        exceeded += output > top
        predictor.learn(request(number), output)
    reach = math.log(3 * exceed * (options.memory_answers + 2)) * (1 - exceed) / options.rate
    assert exceeded <= exceed * len(script) + reach + 1


def test_each_caller_gets_its_own() -> None:
    brief = outputs(1500, 40, 7, caller="brief")
    long = outputs(1500, 800, 8, caller="long")
    mixed = [one for pair in zip(brief, long, strict=True) for one in pair]
    exceeded = serve(OnlineLengthPredictor(), mixed, lag=10)
    for mine in (exceeded[::2], exceeded[1::2]):
        assert sum(mine) / len(mine) == pytest.approx(0.1, abs=0.02)


def test_a_new_caller_borrows_from_its_model_and_then_has_its_own() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, outputs(500, 800, 9, caller="long"))
    assert median(predictor, request(0, caller="brief")) == pytest.approx(800, rel=0.15)
    serve(predictor, outputs(40, 40, 10, caller="brief"))
    assert median(predictor, request(0, caller="brief")) == pytest.approx(40, rel=0.4)
    assert median(predictor, request(0, caller="long")) == pytest.approx(800, rel=0.15)


def test_prompts_and_limits_distinguish_lengths() -> None:
    predictor = OnlineLengthPredictor()
    kinds = [(100, 4096, 30), (3000, 4096, 900), (100, 256, 120)]
    groups = [outputs(300, m, 11 + i, prompt=p, limit=limit) for i, (p, limit, m) in enumerate(kinds)]
    serve(predictor, [one for kind in zip(*groups, strict=True) for one in kind])
    for prompt, limit, middle in kinds:
        assert median(predictor, request(0, prompt=prompt, limit=limit)) == pytest.approx(middle, rel=0.25)


def test_outputs_that_were_cut_would_have_been_longer() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, outputs(600, 200, 20, limit=250))
    assert median(predictor, request(0, limit=250)) == pytest.approx(200, rel=0.1)
    # 36 % were cut at 250, and nothing shows how long they would have been.
    assert bound(predictor, request(1, limit=4096)) is None
    # Some callers allow more: their outputs stand for those that were cut.
    serve(predictor, outputs(600, 200, 21, limit=4096))
    serve(predictor, outputs(600, 200, 22, limit=250))
    assert bound(predictor, request(2, limit=2048)) == pytest.approx(200 * math.exp(0.6 * 1.28), rel=0.35)


def test_all_cut_means_max_tokens() -> None:
    predictor = OnlineLengthPredictor()
    exceeded = serve(predictor, [request(number, limit=100, truth=100) for number in range(300)])
    assert not any(exceeded)
    assert median(predictor, request(0, limit=100)) == 100
    assert bound(predictor, request(0, limit=100)) is None


def test_nothing_is_above_max_tokens_or_below_one() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, outputs(300, 200, 23))
    for limit in (1, 7, 150):
        assert 1 <= (median(predictor, request(0, limit=limit)) or 0) <= limit
        assert (bound(predictor, request(0, limit=limit)) or 1) <= limit
    nothing = OnlineLengthPredictor()
    serve(nothing, [request(number, truth=0, limit=10) for number in range(50)])
    assert median(nothing, request(0)) == 1


def test_a_renewed_bound_is_above_what_was_generated_and_rarely_exceeded() -> None:
    predictor, requests = OnlineLengthPredictor(), outputs(3000, 200, 24)
    outgrown, again = 0, 0
    for one in requests:
        limit, truth = bound(predictor, one), one.output_tokens or 0
        if limit is not None and truth > limit:
            renewed = predictor.renew(one, int(limit))
            assert renewed is None or limit < renewed <= 4096
            outgrown += 1
            again += truth > (renewed or 4096)
        predictor.learn(one, truth)
    assert outgrown > 200
    assert again / outgrown < 0.15
    assert predictor.renew(request(0), 4000) is None


def test_predicting_again_changes_nothing_and_counts_once() -> None:
    once, twice = OnlineLengthPredictor(), OnlineLengthPredictor()
    for one in outputs(400, 200, 25):
        first = bound(once, one)
        assert bound(twice, one) == bound(twice, one) == first
        median(twice, one)
        twice.renew(one, 100)
        for predictor in (once, twice):
            predictor.learn(one, one.output_tokens or 0)
    assert once.state() == twice.state()


def test_a_bound_is_judged_once() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, outputs(100, 200, 34))
    bound(predictor, request(7))
    predictor.learn(request(7), 4000)
    levels = [group["level"] for group in predictor.state()["groups"]]
    predictor.learn(request(7), 4000)
    assert [group["level"] for group in predictor.state()["groups"]] == levels


def test_a_request_that_ends_without_output_is_not_judged() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, outputs(100, 200, 26))
    before = predictor.state()
    bound(predictor, request(7))
    predictor.forget(request(7))
    predictor.forget(request(8))
    assert predictor.state() == before


# ---- its state ------------------------------------------------------------------------------------------------


def test_the_same_calls_give_the_same_answers_through_json_and_pickle() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, [*outputs(300, 200, 27, caller="a"), *outputs(300, 50, 28, caller="b", limit=64)])
    copies = [
        OnlineLengthPredictor.from_state(json.loads(json.dumps(predictor.state()))),
        pickle.loads(pickle.dumps(predictor)),
    ]
    more = [*outputs(200, 300, 29, caller="a"), *outputs(200, 60, 30, caller="c")]
    expected = [(median(predictor, one), bound(predictor, one), predictor.renew(one, 50)) for one in more]
    for copy in copies:
        assert [(median(copy, one), bound(copy, one), copy.renew(one, 50)) for one in more] == expected
        assert serve(copy, more) == serve(pickle.loads(pickle.dumps(predictor)), more)


def test_levels_of_another_exceed_start_over() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, outputs(400, 200, 31))
    fifth = OnlineLengthPredictor.from_state(predictor.state(), OnlineLengthOptions(exceed=0.2))
    assert all(group["level"] is None for group in fifth.state()["groups"])
    assert median(fifth, request(0)) == median(predictor, request(0))
    with pytest.raises(ValueError, match="version"):
        OnlineLengthPredictor.from_state({"version": 0, "groups": []})


def test_memory_is_bounded_and_busy_groups_are_kept() -> None:
    predictor = OnlineLengthPredictor(OnlineLengthOptions(most_groups=40))
    regular = outputs(200, 50, 32, caller="regular")
    serve(predictor, regular)
    for number in range(3000):
        other = request(number, caller=f"{number % 500}" + "x" * 10_000, prompt=number)
        bound(predictor, other)
        predictor.learn(other, 900)
        if number % 10 == 0:
            predictor.learn(regular[number % 200], 50)
    state = predictor.state()
    assert len(state["groups"]) <= 40
    assert max(len(str(group["key"])) for group in state["groups"]) < 200
    assert median(predictor, request(0, caller="regular")) == pytest.approx(50, rel=0.1)


def test_memory_for_requests_that_never_end_is_bounded() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, outputs(50, 200, 33))
    for number in range(9000):
        bound(predictor, request(10_000 + number))
    assert len(pickle.dumps(predictor)) < 1_500_000


@pytest.mark.parametrize(
    "wrong",
    [{"exceed": 0.0}, {"exceed": 0.9}, {"memory_answers": 5}, {"rate": -1}, {"prior_answers": 0}, {"most_groups": 1}],
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"length\."):
        OnlineLengthOptions(**wrong)  # type: ignore[arg-type]


def test_a_copy_predicts_the_same_and_learns_no_more() -> None:
    predictor = OnlineLengthPredictor()
    serve(predictor, outputs(300, 200, 27))
    before, copied = predictor.state(), predictor.copy()
    serve(predictor, outputs(5, 90, 28))
    assert copied.state() == before != predictor.state()
    assert list(predictor.groups()) == predictor.state()["groups"]
