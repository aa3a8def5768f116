"""Where requests go: always the engines with the fewest sequences for their weight, whatever happened before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.effort import lines_executed
from core.toy import request, sequence, spec
from throttllem.core.engine_state import EngineState
from throttllem.core.pool.routing import MOST_TRIED, Router
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import EnginePrefix


def engine(key, tp=1):
    found = spec(tp=tp, kv_blocks=100 * tp)
    return EngineState(engine=key, tp=tp, spec=found, board=Scoreboard(found.block_tokens))


def in_order(router):
    return sorted(router.serving.values(), key=lambda one: ((len(one.board) + 1) / router.weight_of(one), one.engine))


@given(st.lists(st.tuples(st.sampled_from(["serve", "stop", "give", "end"]), st.integers(0, 7)), max_size=60))
def test_the_least_loaded_come_first(deeds):
    router, engines = Router({1: 1.0, 2: 2.5}), [engine(key, 1 + key % 2) for key in range(8)]
    for number, (deed, key) in enumerate(deeds):
        one = engines[key]
        if deed == "serve" and key not in router.serving:
            router.add(one)
        elif deed == "stop" and key in router.serving:
            router.remove(one)
        elif deed == "give":
            one.board.dispatch(sequence(number, 4, 4))
        elif deed == "end" and one.board.pending:
            one.board.remove(next(iter(one.board.pending)))
            router.changed(one)
        assert router.candidates() == in_order(router)[:MOST_TRIED]
        assert router.weight == sum(map(router.weight_of, router.serving.values()))


def test_engines_that_cannot_hold_a_request_are_passed_over():
    router = Router({})
    for key in range(6):
        router.add(engine(key, 1 + key % 2))
    assert [one.tp for one in router.candidates(lambda spec: spec.tp == 2)] == [2, 2, 2]
    assert router.candidates(lambda spec: spec.tp == 4) == []
    assert router.candidates() == in_order(router)[:MOST_TRIED]


@pytest.mark.parametrize("few", [4, 16])
def test_the_next_engine_costs_the_same_however_many_there_are(few):
    def lines(count):
        router = Router({})
        for key in range(count):
            router.add(engine(key))
        for number in range(4 * count):
            router.candidates()[0].board.dispatch(sequence(number, 4, 4))
        assert {len(one.board) for one in router.serving.values()} == {4}
        return lines_executed(router.candidates)

    assert lines(256) <= lines(few) + 2


def asked(*cached):
    return request(99, 40, 4, prefixes=tuple(EnginePrefix(engine=key, cached_prompt_tokens=n) for key, n in cached))


@pytest.mark.parametrize(
    ("more", "cached", "first"),
    [
        (0, [(4, 8)], 4),
        (1, [(4, 8)], 4),
        (2, [(4, 8)], 0),
        (0, [(4, 8), (5, 12)], 5),
        (1, [(4, 8), (5, 8)], 5),
        (0, [(4, 0)], 0),
        (0, [(7, 8)], 0),
        (0, [], 0),
    ],
)
def test_a_cached_prefix_decides_between_engines_one_sequence_apart(more, cached, first):
    router = Router({})
    for key in range(6):
        router.add(engine(key))
    for number in range(more):
        router.serving[4].board.dispatch(sequence(number, 4, 4))
    found = router.with_prefix(asked(*cached), router.candidates())
    assert found[0].engine == first and len({one.engine for one in found}) == MOST_TRIED


def test_a_request_is_planned_with_what_its_engine_has():
    it = asked((3, 8), (4, 12))
    assert [it.on(key).computed_prompt_tokens for key in (3, 4, 5)] == [32, 28, 40]
    assert it.on(4).on(5) == it and it.on(3).on(4) == it.on(4)
    assert (one := request(1, 40, 4, cached_prompt_tokens=8)).on(3) is one
