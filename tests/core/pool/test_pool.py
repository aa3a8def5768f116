"""How a pool comes to its target: starts, drains and stops within its GPUs, deadlines and pauses after failures."""

from dataclasses import replace

import pytest

from core.effort import lines_executed
from core.stories import SIZES, arrive, names, options
from core.toy import request
from core.world import World
from throttllem.core.engine_state import Phase
from throttllem.core.pool.pool import PoolOptions
from throttllem.core.types import Arrived, Dispatch, EngineReady, OptionError, StartEngine, Stepped, StopEngine, Timer


def pool(gpus, engines, **changes):
    """A pool whose first engine is ready, and those that it commanded besides it."""
    live = World(options(pool=PoolOptions(gpus=gpus, engines=engines), specs=SIZES, **changes))
    live.ready(0, SIZES[max(engines)])
    return live


def ready(live):
    for key, tp in list(live.starting.items()):
        live.ready(key, SIZES[tp])
    return live


def phases(live):
    return {view.engine: view.phase for view in live.controller.snapshot().engines}


@pytest.mark.parametrize(
    ("gpus", "engines"), [(4, {}), (4, {1: 5}), (4, {2: 2, 1: 1}), (0, {1: 1}), (4, {1: -1, 2: 1})]
)
def test_a_pool_holds_its_engines(gpus, engines):
    with pytest.raises(OptionError, match=r"pool\."):
        PoolOptions(gpus=gpus, engines=engines)


def test_all_engines_of_the_target_are_started_and_share_the_requests():
    live = ready(pool(5, {1: 1, 2: 2}))
    assert set(phases(live).values()) == {Phase.SERVING}
    assert sorted(up.spec.tp for up in live.up.values()) == [1, 2, 2]
    for key in range(10):
        arrive(live, key)
    given = [sum(on == engine for on in live.on.values()) for engine in sorted(live.up)]
    assert [given[key] / live.up[key].spec.tp for key in sorted(live.up)] == [2.0] * 3
    live.run_out(SIZES.get)
    live.check_end()


def test_a_lost_engine_fails_its_own_requests_and_is_replaced():
    live = ready(pool(3, {1: 3}))
    for key in range(6):
        arrive(live, key)
    had = [request for request, on in live.on.items() if on == 1]
    commands = live.lose(1)
    assert [command.request_id for command in commands if type(command).__name__ == "Fail"] == had
    assert StartEngine(engine=3, tp=1) in commands
    assert {live.on[request] for request in live.on} == {0, 2}
    live.run_out(SIZES.get)
    live.check_end()


def test_a_start_that_hangs_ends_at_its_deadline_and_is_tried_again_after_a_pause():
    live = pool(2, {1: 2})
    assert live.starting == {1: 1}
    live.advance(19.9)
    assert live.starting == {1: 1}, "four times as long as an engine takes (5 s)"
    live.advance(0.2)
    assert not live.starting
    live.advance(5.0)
    assert live.starting == {2: 1}
    live.advance(20.0)
    assert not live.starting
    live.advance(9.9)
    assert not live.starting, "the pause doubles"
    live.advance(0.2)
    assert live.starting == {3: 1}
    assert arrive(live, 0)[0] == Dispatch(engine=0, request_id=0)
    live.ready(3, SIZES[1])
    assert arrive(live, 1)[0] == Dispatch(engine=3, request_id=1)
    assert "StartEngine" in names(live.lose(3)), "an engine that was up is replaced at once"


def test_a_pool_that_is_down_does_not_wait_for_long_pauses():
    live = pool(1, {1: 1})
    live.lose(0)
    for _ in range(5):
        (key,) = live.starting
        live.lose(key)
        live.advance(4.9)
        assert not live.starting
        live.advance(0.2)
        assert len(live.starting) == 1, "after the time that an engine takes (5 s), however often it failed"


def test_a_failed_start_is_tried_again_after_a_pause():
    live = pool(2, {1: 2})
    live.lose(1)
    assert not live.starting
    live.advance(4.9)
    assert not live.starting
    live.advance(0.2)
    assert live.starting == {2: 1}


def test_an_empty_engine_too_many_is_stopped_at_once():
    live = ready(pool(4, {1: 2}))
    for key in range(2):
        arrive(live, key, 4, 30)
    live.ready(9, SIZES[1])
    live.ready(10, SIZES[2])
    assert live.up.keys() == {0, 1}
    live.run_out(SIZES.get)
    live.check_end()


def test_engines_of_the_wrong_size_make_room():
    """Three GPUs, taken by one of size 2 that is not wanted and one of size 1: it drains, and others take its GPUs."""
    live = World(options(pool=PoolOptions(gpus=3, engines={1: 3}), specs=SIZES))
    live.ready(0, SIZES[2])
    arrive(live, 0, 4, 40)
    assert live.starting == {1: 1}
    assert phases(live)[0] is Phase.SERVING, "the only one that serves stays until another is up"
    ready(live)
    assert phases(live)[0] is Phase.DRAINING
    while 0 in live.up:
        assert sum(live.starting.values()) == 0, "its GPUs are not free yet"
        live.end_iteration(0)
    assert live.starting == {2: 1, 3: 1}
    live.run_out(SIZES.get)
    live.check_end()


def test_a_request_that_fits_one_size_alone_goes_there():
    live = ready(pool(4, {1: 2, 2: 1}))
    (large,) = (key for key, up in live.up.items() if up.spec.tp == 2)
    for key in range(6):
        arrive(live, key)
    assert arrive(live, 9, 100, 29)[0] == Dispatch(engine=large, request_id=9)


def test_a_late_report_of_an_engine_that_was_given_up_starts_nothing_twice():
    live = pool(2, {1: 2})
    live.advance(30.0)
    stopped = [command for _, _, commands in live.log for command in commands if isinstance(command, StopEngine)]
    assert stopped[0] == StopEngine(engine=1)
    commands = live.handle(EngineReady(engine=0, spec=SIZES[1]))
    assert commands == []


def test_one_engine_of_a_pool_is_commanded_as_an_engine_alone():
    def commands(found):
        live = World(found)
        live.ready(0, replace(SIZES[1]))
        for key in range(40):
            live.now_s += 0.05
            arrive(live, key, 4, 8)
            for engine in [key for key, up in live.up.items() if up.in_progress]:
                live.end_iteration(engine)
        live.run_out(SIZES.get)
        live.check_end()
        return [done for *_, done in live.log]

    assert commands(options(pool=PoolOptions(gpus=1, engines={1: 1}))) == commands(options())


def test_an_event_costs_the_same_in_a_pool_of_64():
    def lines(engines):
        live = ready(pool(engines, {1: engines}))
        for key in range(2 * engines):
            arrive(live, key)
        for engine in live.up:
            live.end_iteration(engine)
        controller, last = live.controller, max(live.up)
        had = list(controller.state().engines[last].board.running)

        def events():
            controller.handle(Arrived(request=request(9000, 4, 8, arrival_s=live.now_s)), live.now_s)
            controller.handle(Timer(), live.now_s)
            controller.handle(Stepped(engine=last, iteration=1, finished=(had[0],)), live.now_s)
            controller.handle(Timer(), live.now_s)

        return lines_executed(events)

    assert lines(64) <= 1.1 * lines(4)
