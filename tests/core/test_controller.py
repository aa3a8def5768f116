"""The controller on short stories told event by event; the state machine looks for the rest."""

import pytest

from core.effort import lines_executed
from core.stories import SIZES, arrive, names, options, world
from core.toy import CLOCKS_MHZ, SPEC, TOP_MHZ, handle, request, spec
from core.world import World
from throttllem.core.admission import AdmissionOptions
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.controller import Controller
from throttllem.core.types import (
    Arrived,
    Cancel,
    Cancelled,
    Dispatch,
    EngineLost,
    EngineReady,
    Fail,
    Reason,
    Reject,
    SetClock,
    Slo,
    StartEngine,
    Stepped,
    Timer,
    VerdictKind,
)


def test_the_first_request_is_dispatched_and_the_clock_falls():
    told = world()
    assert told.controller.next_deadline() is None
    dispatch, clock = arrive(told, 1)
    assert dispatch == Dispatch(engine=0, request_id=1)
    assert (clock.engine, clock.plan.mhz, clock.plan.why) == (0, CLOCKS_MHZ[0], Reason.LOWEST_CLOCK)
    assert told.controller.next_deadline() == 1.0
    assert told.controller.serving() == 0
    told.run_out(SIZES.get)
    told.check_end()
    assert told.controller.next_deadline() is None


def test_who_cannot_join_waits_and_says_why():
    told = world()
    # 25 of 32 blocks are reserved.
    arrive(told, 1, 60, 40)
    (clock,) = arrive(told, 2, 60, 40)
    assert (clock.plan.mhz, clock.plan.why) == (TOP_MHZ, Reason.WAITING)
    arrive(told, 3, 1, 1)
    snapshot = told.controller.snapshot()
    assert (snapshot.queue, snapshot.head.kind, snapshot.head.why) == (2, VerdictKind.WAIT, Reason.KV)
    told.run_out(SIZES.get)
    told.check_end()
    assert list(told.ended) == [1, 2, 3] or list(told.ended) == [1, 3, 2]


def test_without_slo_awareness_the_engine_gets_everything():
    told = world(options(ClockPolicy.TOP, aware=False))
    for key in range(30):
        assert arrive(told, key, 60, 40) == [Dispatch(engine=0, request_id=key)]
    told.run_out(SIZES.get)
    told.check_end()


@pytest.mark.parametrize("aware", [True, False])
def test_what_never_fits_is_rejected_at_once(aware):
    told = world(options(aware=aware))
    assert arrive(told, 1, 100, 29) == [Reject(request_id=1, why=Reason.NEVER_FITS_KV)]
    assert arrive(told, 2, 200, 57) == [Reject(request_id=2, why=Reason.NEVER_FITS_CONTEXT)]
    assert "Dispatch" in names(arrive(told, 3, 100, 28))


def test_a_size_that_nobody_can_start_holds_nobody_up():
    """`specs` may name larger sizes; without an autoscaler none of them ever comes."""
    told = world(options(specs=SIZES))
    assert arrive(told, 1, 100, 29) == [Reject(request_id=1, why=Reason.NEVER_FITS_KV)]


def test_the_queue_is_bounded():
    told = World(options(admission=AdmissionOptions(queue_limit=2)))
    assert arrive(told, 1) == arrive(told, 2) == []
    assert told.controller.snapshot().head.why is Reason.NO_ENGINE
    assert arrive(told, 3) == [Reject(request_id=3, why=Reason.QUEUE_FULL)]
    assert names(told.ready(0, SPEC))[:2] == ["Dispatch", "Dispatch"]


@pytest.mark.parametrize("slo", [Slo(e2e_s=0.001), Slo(tbt_s=0.001), Slo(ttft_s=0.001)])
def test_a_lost_request_is_served_at_the_top_clock_and_counted(slo):
    told = world()
    arrive(told, 1, 4, 8, slo=slo)
    assert told.controller.snapshot().engines[0].lost_requests == 1
    assert told.up[0].asked_mhz == TOP_MHZ
    told.run_out(SIZES.get)
    assert told.controller.snapshot().counts.lost == 1
    told.check_end()


def test_cancel_in_the_queue_and_in_the_engine():
    told = World(options())
    arrive(told, 1)
    assert told.cancel(1) == [Reject(request_id=1, why=Reason.CANCELLED)]
    told.ready(0, SIZES[1])
    arrive(told, 2)
    assert told.cancel(2)[0] == Cancel(engine=0, request_id=2)
    assert told.tell(Cancelled(request_id=2)) == []
    told.run_out(SIZES.get)
    told.check_end()


def test_a_lost_engine_fails_what_ran_and_is_replaced():
    told = world()
    arrive(told, 1)
    assert told.lose(0) == [Fail(request_id=1, why=Reason.ENGINE_LOST), StartEngine(engine=1, tp=1)]
    assert arrive(told, 2) == []
    assert names(told.ready(1, SIZES[1]))[0] == "Dispatch"
    assert told.tell(EngineLost(engine=0)) == []
    # An engine that does not come up is tried again under another name.
    assert told.lose(1)[-1] == StartEngine(engine=2, tp=1)
    assert told.lose(2) == [StartEngine(engine=3, tp=1)]
    arrive(told, 3)
    told.run_out(SIZES.get)
    told.check_end()


def test_a_clock_that_cannot_be_read_means_the_top_clock():
    told = world()
    arrive(told, 1)
    (again,) = told.read_clock(0, None)
    assert (again.plan.mhz, again.plan.why) == (TOP_MHZ, Reason.UNKNOWN_STATE)
    assert told.controller.snapshot().engines[0].clock_mhz is None
    assert told.read_clock(7, None) == []


@pytest.mark.parametrize("policy", [ClockPolicy.TOP, ClockPolicy.FIXED])
def test_a_clock_that_is_not_what_was_asked_is_asked_again(policy):
    told = world(options(policy, aware=False))
    told.now_s = 10.0
    (again,) = told.read_clock(0, 800)
    assert isinstance(again, SetClock) and again.plan.mhz == TOP_MHZ


def test_a_switch_under_way_is_not_asked_for_twice():
    told = world()
    arrive(told, 1)
    assert told.read_clock(0, 1200) == []
    assert told.read_clock(0, CLOCKS_MHZ[0]) == []


def test_a_timer_plans_again_and_moves_on():
    told = world()
    arrive(told, 1, 4, 60)
    assert told.controller.next_deadline() == 1.0
    told.now_s = 1.0
    told.tell(Timer())
    assert told.controller.next_deadline() == 2.0


def test_an_unknown_engine_changes_nothing():
    controller = Controller(options())
    assert handle(controller, Stepped(engine=4, iteration=0, finished=(1,)), 0.0) == []
    assert handle(controller, EngineLost(engine=4), 0.0) == []
    assert controller.projection(4) is None and controller.serving() is None


def test_the_same_engine_is_ready_only_once():
    told = world()
    arrive(told, 1)
    assert handle(told.controller, EngineReady(engine=0, spec=SIZES[1]), 0.0) == []
    told.run_out(SIZES.get)
    told.check_end()


def test_an_unchanged_iteration_is_o1():
    def lines(rows):
        large = spec(kv_blocks=100_000, max_batch=1000, prefill_budget_tokens=100_000)
        controller = Controller(options(ClockPolicy.TOP, aware=False))
        handle(controller, EngineReady(engine=0, spec=large), 0.0)
        for key in range(rows):
            handle(controller, Arrived(request=request(key, 4, 90)), 0.0)
        handle(controller, Stepped(engine=0, iteration=0, started=tuple(range(rows))), 0.1)
        return lines_executed(lambda: handle(controller, Stepped(engine=0, iteration=1), 0.2))

    assert lines(300) == lines(3)


def test_a_cancelled_batch_leaves_no_iteration_in_progress():
    """Slack is counted from the iteration under way; one that was cancelled away must not lend its beginning."""
    plans = []
    for cancelled in (False, True):
        told = world()
        arrive(told, 0, 4, 8)
        told.end_iteration(0)
        if cancelled:
            told.cancel(0)
        else:
            while told.on:
                told.end_iteration(0)
        told.now_s = 30.0
        commands = arrive(told, 1, 4, 100, slo=Slo(e2e_s=2.0))
        plans.append((names(commands), told.controller.snapshot().engines[0].plan))
    assert plans[0] == plans[1]
