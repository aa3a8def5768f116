"""Corrections and observations through the controller: what is booked, and when it calls for a new plan."""

import pytest

from core.effort import lines_executed
from core.stories import SIZES, arrive, names, options, world
from core.toy import handle, request, spec
from core.world import World
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.controller import Controller
from throttllem.core.external_load import Drift
from throttllem.core.types import Arrived, EngineReady, Observed, Progressed, Reason, Stepped


def batch(told):
    return told.controller.projection(0).batch.tolist()


def view(told):
    return told.controller.snapshot().engines[0]


def observe(told, running, waiting=0, kv_blocks=None):
    look = Observed(engine=0, running=running, waiting=waiting, kv_blocks=kv_blocks)
    return [command for _ in range(3) for command in told.tell(look)]  # so often it must be seen


def step(told, times=1):
    for _ in range(times):
        told.end_iteration(0)


def test_a_lagging_row_is_planned_for_longer_with_the_next_iteration():
    told = world()
    arrive(told, 1, 4, 20)
    step(told, 6)
    assert told.tell(Progressed(engine=0, request_id=1, tokens=3)) == []
    step(told)
    # 7 iterations, 4 tokens: 16 to come.
    assert told.controller.projection(0).horizon == 16
    assert (view(told).kv_blocks, view(told).drift.corrections) == (2, 1)
    told.run_out(SIZES.get)
    assert told.controller.snapshot().counts.finished == 1


def test_a_waiting_row_with_tokens_begins_and_is_planned_at_once():
    told = world()
    arrive(told, 1, 4, 20)
    told.tell(Progressed(engine=0, request_id=1, tokens=2))
    assert (view(told).running, view(told).pending) == (1, 0)
    assert told.controller.projection(0).horizon == 18


@pytest.mark.parametrize(("tokens", "horizon"), [(-3, 19), (0, 19), (1, 19), (500, 1)])
def test_no_row_has_less_than_one_token_or_more_than_it_may_have(tokens, horizon):
    told = world()
    arrive(told, 1, 4, 20)
    told.tell(Progressed(engine=0, request_id=1, tokens=tokens))
    assert told.controller.projection(0).horizon == horizon


def test_nobodys_progress_is_ignored():
    told = world()
    arrive(told, 1)
    before = told.controller.snapshot()
    assert told.tell(Progressed(engine=0, request_id=9, tokens=4)) == []
    assert told.tell(Progressed(engine=5, request_id=1, tokens=4)) == []
    assert told.tell(Observed(engine=5, running=4, waiting=0)) == []
    assert told.controller.snapshot() == before


def test_what_others_hold_is_in_every_coming_iteration_until_the_next_word():
    told = world()
    arrive(told, 1, 4, 10)
    step(told, 2)
    own = told.controller.projection(0).kv_blocks.tolist()
    assert (batch(told), view(told).drift) == ([1] * 9, Drift())
    observe(told, 3, 1, 12)
    assert batch(told) == [4] * 8
    # 5 tokens are ours: 2 blocks of 12.
    assert told.controller.projection(0).kv_blocks.tolist() == [blocks + 10 for blocks in own[1:]]
    assert (view(told).foreign, view(told).kv_blocks) == (3, 2)
    assert view(told).drift == Drift(batch=2, kv_blocks=10, mean_batch=2.0, mean_kv_blocks=10.0, corrections=1)
    observe(told, 1, 0, 2)
    assert (batch(told), view(told).foreign) == ([1] * 8, 0)
    assert view(told).drift == Drift(batch=0, kv_blocks=0, mean_batch=1.0, mean_kv_blocks=5.0, corrections=2)


def test_somebody_elses_sequences_take_places():
    told = world()
    arrive(told, 1, 4, 40)
    step(told)
    observe(told, 8)
    arrive(told, 2)
    assert told.controller.snapshot().head.why is Reason.BATCH
    assert names(observe(told, 7))[0] == "Dispatch"
    told.run_out(SIZES.get)
    told.check_end()


def test_an_empty_engine_takes_the_next_one_whoever_else_is_there():
    told = world()
    observe(told, 500, 500, 5000)
    assert names(arrive(told, 1))[0] == "Dispatch"
    told.run_out(SIZES.get)
    told.check_end()


def test_a_request_counts_with_all_its_sequences():
    told = world()
    arrive(told, 1, 4, 8, sequences=3)
    assert batch(told) == [3] * 8
    step(told)
    assert view(told).kv_blocks == 3
    observe(told, 3, 0, 3)
    assert (view(told).foreign, view(told).drift.batch, view(told).drift.kv_blocks) == (0, 0, 0)


def test_only_news_is_planned_for_and_the_rest_is_o1():
    def lines(rows, running, kv_blocks):
        large = spec(kv_blocks=100_000, max_batch=1000, prefill_budget_tokens=100_000)
        controller = Controller(options(ClockPolicy.TOP, aware=False))
        handle(controller, EngineReady(engine=0, spec=large), 0.0)
        for key in range(rows):
            handle(controller, Arrived(request=request(key, 4, 90)), 0.0)
        handle(controller, Stepped(engine=0, iteration=0, started=tuple(range(rows))), 0.1)
        told = Observed(engine=0, running=running, waiting=0, kv_blocks=kv_blocks)
        for _ in range(2):
            handle(controller, told, 0.2)
        return lines_executed(lambda: handle(controller, told, 0.2))

    assert lines(300, 300, 300) == lines(3, 3, 3)
    assert lines(300, 300, 300 + 999) == lines(3, 3, 3)
    assert lines(300, 301, 300) > lines(3, 3, 3)
    assert lines(300, 300, 300 + 1000) > lines(3, 3, 3)


def test_small_moves_add_up_to_one():
    told = World(options())
    told.ready(0, spec(kv_blocks=1000))
    arrive(told, 1, 4, 40)
    step(told)
    for kv_blocks, corrections in ((5, 0), (9, 0), (10, 0), (11, 1), (15, 1)):
        observe(told, 1, 0, kv_blocks)
        assert view(told).drift.corrections == corrections


def test_an_engine_that_never_stepped_can_be_observed():
    told = world()
    observe(told, 2, 1, 7)
    assert (view(told).foreign, view(told).kv_blocks) == (3, 0)
