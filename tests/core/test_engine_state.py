"""Several engines under one controller: shadow instancing, grace, going back, losses."""

from core.stories import SIZES, arrive, names, options, scaling, world
from core.world import World
from throttllem.core.engine_state import Phase
from throttllem.core.types import Dispatch, Reason, Reject, StopEngine


def loaded(found=None):
    """A small engine under more load than it can carry, with one long output running."""
    live = world(found or scaling())
    arrive(live, 0, 4, 100)
    for key in range(1, 5):
        live.now_s += 0.2
        arrive(live, key, 4, 2)
    return live


def test_shadow_instancing():
    live = loaded()
    live.advance(0.5)
    assert live.starting == {1: 2}, "more than one request per second: size 2 is started beside the old one"
    live.end_iteration(0)
    assert live.controller.serving() == 0, "the old one serves until the new one is ready"
    live.ready(1, SIZES[2])
    assert live.controller.serving() == 1
    assert [view.phase for view in live.controller.snapshot().engines] == [Phase.DRAINING, Phase.SERVING]
    assert arrive(live, 9, 4, 4)[0] == Dispatch(engine=1, request_id=9)
    while 0 in live.up:
        assert live.on[0] == 0, "stopped before its last request was through"
        live.end_iteration(0)
    assert live.ended[0] == "finished"
    assert live.log[-1][2] == [StopEngine(engine=0)]
    live.run_out(SIZES.get)
    live.check_end()


def test_smaller_only_after_the_grace_period_and_never_for_a_head_that_needs_more():
    live = loaded()
    live.advance(0.5)
    live.ready(1, SIZES[2])
    changed_s = live.now_s
    while live.on:
        for key in [key for key, up in live.up.items() if up.in_progress]:
            live.end_iteration(key)
    live.advance(4.9)
    assert not live.starting
    live.advance(1.2)
    assert list(live.starting.values()) == [1]
    assert live.now_s - changed_s > 5.0
    live.ready(2, SIZES[1])
    assert live.up.keys() == {2}, "the idle larger one is stopped at once"
    # 33 blocks fit on size 2 only: it waits, and size 2 comes back for it.
    arrive(live, 50, 100, 29)
    assert live.controller.snapshot().head.why is Reason.NEVER_FITS_KV
    live.advance(1.0)
    assert list(live.starting.values()) == [2]
    live.run_out(SIZES.get)
    assert live.ended[50] == "finished"
    live.check_end()


def test_back_to_a_draining_engine_stops_the_idle_one():
    """Size 2 drains with a long output, size 1 serves and is idle; load comes back: size 2 serves, size 1 goes."""
    live = World(scaling())
    live.ready(0, SIZES[2])
    arrive(live, 0, 4, 200)
    live.end_iteration(0)
    live.advance(9.0)
    assert list(live.starting.values()) == [1], "no load, and the first grace period is over: size 1 will do"
    live.ready(1, SIZES[1])
    for key in range(10, 20):
        live.cancel(key) if key in live.on else arrive(live, key, 4, 1)
        live.cancel(key)
    live.advance(1.0)
    assert live.controller.serving() == 0
    assert live.up.keys() == {0}
    live.run_out(SIZES.get)
    live.check_end()


def test_nothing_is_scaled_before_anything_was_measured():
    live = World(scaling())
    assert live.ready(0, SIZES[2]) == []
    live.advance(30.0)
    assert not live.starting


def test_a_draining_engine_that_is_lost_is_not_replaced():
    live = loaded()
    live.advance(0.5)
    live.ready(1, SIZES[2])
    assert set(names(live.lose(0))) == {"Fail"}
    live.run_out(SIZES.get)
    live.check_end()


def test_without_an_autoscaler_a_second_engine_takes_over_too():
    """The head fits only the old, larger engine: it is rejected, not left waiting for an engine that goes."""
    live = World(options())
    live.ready(0, SIZES[2])
    arrive(live, 0, 4, 20)
    live.ready(1, SIZES[1])
    assert arrive(live, 1, 100, 29) == [Reject(request_id=1, why=Reason.NEVER_FITS_KV)]
    live.run_out(SIZES.get)
    assert live.up.keys() == {1}
    live.check_end()


def test_an_engine_that_drains_serves_again_when_its_successor_is_lost():
    live = loaded()
    live.advance(0.5)
    live.ready(1, SIZES[2])
    assert live.controller.serving() == 1
    commands = live.lose(1)
    assert live.controller.serving() == 0
    assert "StartEngine" not in names(commands)
    arrive(live, 9, 4, 4)
    live.run_out(SIZES.get)
    live.check_end()
