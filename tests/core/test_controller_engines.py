"""Several engines under one controller: shadow instancing, grace, going back, losses."""

from core.stories import SIZES, arrive, names, options, scaling, world
from core.world import World
from throttllem.core.engine_state import Phase
from throttllem.core.types import Dispatch, Reason, Reject, StopEngine


def loaded(found=None):
    """A small engine under more load than it was made for, with one long answer running."""
    told = world(found or scaling())
    arrive(told, 0, 4, 100)
    for key in range(1, 5):
        told.now_s += 0.2
        arrive(told, key, 4, 2)
    return told


def test_shadow_instancing():
    told = loaded()
    told.advance(0.5)
    assert told.starting == {1: 2}, "more than one request per second: size 2 is started beside the old one"
    told.end_iteration(0)
    assert told.controller.serving() == 0, "the old one serves until the new one is ready"
    told.ready(1, SIZES[2])
    assert told.controller.serving() == 1
    assert [view.phase for view in told.controller.snapshot().engines] == [Phase.DRAINING, Phase.SERVING]
    assert arrive(told, 9, 4, 4)[0] == Dispatch(engine=1, request_id=9)
    while 0 in told.up:
        assert told.on[0] == 0, "stopped before its last request was through"
        told.end_iteration(0)
    assert told.ended[0] == "finished"
    assert told.log[-1][2] == [StopEngine(engine=0)]
    told.run_out(SIZES.get)
    told.check_end()


def test_smaller_only_after_the_grace_period_and_never_for_a_head_that_needs_more():
    told = loaded()
    told.advance(0.5)
    told.ready(1, SIZES[2])
    changed_s = told.now_s
    while told.on:
        for key in [key for key, up in told.up.items() if up.in_progress]:
            told.end_iteration(key)
    told.advance(4.9)
    assert not told.starting
    told.advance(1.2)
    assert list(told.starting.values()) == [1]
    assert told.now_s - changed_s > 5.0
    told.ready(2, SIZES[1])
    assert told.up.keys() == {2}, "the idle larger one is stopped at once"
    # 33 blocks fit on size 2 only: it waits, and size 2 comes back for it.
    arrive(told, 50, 100, 29)
    assert told.controller.snapshot().head.why is Reason.NEVER_FITS_KV
    told.advance(1.0)
    assert list(told.starting.values()) == [2]
    told.run_out(SIZES.get)
    assert told.ended[50] == "finished"
    told.check_end()


def test_back_to_a_draining_engine_stops_the_idle_one():
    """Size 2 drains with a long answer, size 1 serves and is idle; load comes back: size 2 serves, size 1 goes."""
    told = World(scaling())
    told.ready(0, SIZES[2])
    arrive(told, 0, 4, 200)
    told.end_iteration(0)
    told.advance(9.0)
    assert list(told.starting.values()) == [1], "no load, and the first grace period is over: size 1 will do"
    told.ready(1, SIZES[1])
    for key in range(10, 20):
        told.cancel(key) if key in told.on else arrive(told, key, 4, 1)
        told.cancel(key)
    told.advance(1.0)
    assert told.controller.serving() == 0
    assert told.up.keys() == {0}
    told.run_out(SIZES.get)
    told.check_end()


def test_nothing_is_scaled_before_anything_was_measured():
    told = World(scaling())
    assert told.ready(0, SIZES[2]) == []
    told.advance(30.0)
    assert not told.starting


def test_a_draining_engine_that_is_lost_is_not_replaced():
    told = loaded()
    told.advance(0.5)
    told.ready(1, SIZES[2])
    assert set(names(told.lose(0))) == {"Fail"}
    told.run_out(SIZES.get)
    told.check_end()


def test_without_an_autoscaler_a_second_engine_takes_over_too():
    """The head fits only the old, larger engine: it is rejected, not left waiting for an engine that goes."""
    told = World(options())
    told.ready(0, SIZES[2])
    arrive(told, 0, 4, 20)
    told.ready(1, SIZES[1])
    assert arrive(told, 1, 100, 29) == [Reject(request_id=1, why=Reason.NEVER_FITS_KV)]
    told.run_out(SIZES.get)
    assert told.up.keys() == {1}
    told.check_end()


def test_an_engine_that_drains_serves_again_when_its_successor_is_lost():
    told = loaded()
    told.advance(0.5)
    told.ready(1, SIZES[2])
    assert told.controller.serving() == 1
    commands = told.lose(1)
    assert told.controller.serving() == 0
    assert "StartEngine" not in names(commands)
    arrive(told, 9, 4, 4)
    told.run_out(SIZES.get)
    told.check_end()
