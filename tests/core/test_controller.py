"""The controller, event by event; the state machine looks for the rest."""

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
    Observed,
    Progressed,
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
    live = world()
    assert live.controller.next_deadline() is None
    dispatch, clock = arrive(live, 1)
    assert dispatch == Dispatch(engine=0, request_id=1)
    assert (clock.engine, clock.plan.mhz, clock.plan.why) == (0, CLOCKS_MHZ[0], Reason.LOWEST_CLOCK)
    assert live.controller.next_deadline() == 1.0
    assert live.controller.serving() == 0
    live.run_out(SIZES.get)
    live.check_end()
    assert live.controller.next_deadline() is None


def test_a_request_that_cannot_join_waits_with_a_reason():
    live = world()
    # 25 of 32 blocks are reserved.
    arrive(live, 1, 60, 40)
    (clock,) = arrive(live, 2, 60, 40)
    assert (clock.plan.mhz, clock.plan.why) == (TOP_MHZ, Reason.WAITING)
    arrive(live, 3, 1, 1)
    snapshot = live.controller.snapshot()
    assert (snapshot.queue, snapshot.head.kind, snapshot.head.why) == (2, VerdictKind.WAIT, Reason.KV)
    live.run_out(SIZES.get)
    live.check_end()
    assert list(live.ended) == [1, 2, 3] or list(live.ended) == [1, 3, 2]


def test_without_slo_awareness_the_engine_gets_everything():
    live = world(options(ClockPolicy.TOP, aware=False))
    for key in range(30):
        assert arrive(live, key, 60, 40) == [Dispatch(engine=0, request_id=key)]
    live.run_out(SIZES.get)
    live.check_end()


@pytest.mark.parametrize("aware", [True, False])
def test_what_never_fits_is_rejected_at_once(aware):
    live = world(options(aware=aware))
    assert arrive(live, 1, 100, 29) == [Reject(request_id=1, why=Reason.NEVER_FITS_KV)]
    assert arrive(live, 2, 200, 57) == [Reject(request_id=2, why=Reason.NEVER_FITS_CONTEXT)]
    assert "Dispatch" in names(arrive(live, 3, 100, 28))


def test_a_size_that_cannot_be_started_holds_up_no_request():
    """`specs` may name larger sizes; without an autoscaler none of them ever comes."""
    live = world(options(specs=SIZES))
    assert arrive(live, 1, 100, 29) == [Reject(request_id=1, why=Reason.NEVER_FITS_KV)]


def test_the_queue_is_bounded():
    live = World(options(admission=AdmissionOptions(queue_limit=2)))
    assert arrive(live, 1) == arrive(live, 2) == []
    assert live.controller.snapshot().head.why is Reason.NO_ENGINE
    assert arrive(live, 3) == [Reject(request_id=3, why=Reason.QUEUE_FULL)]
    assert names(live.ready(0, SPEC))[:2] == ["Dispatch", "Dispatch"]


@pytest.mark.parametrize("slo", [Slo(e2e_s=0.001), Slo(tbt_s=0.001), Slo(ttft_s=0.001)])
def test_a_lost_request_is_served_at_the_maximum_clock_and_counted(slo):
    live = world()
    arrive(live, 1, 4, 8, slo=slo)
    assert live.controller.snapshot().engines[0].lost_requests == 1
    assert live.up[0].set_mhz == TOP_MHZ
    live.run_out(SIZES.get)
    assert live.controller.snapshot().counts.lost == 1
    live.check_end()


def test_cancel_in_the_queue_and_in_the_engine():
    live = World(options())
    arrive(live, 1)
    assert live.cancel(1) == [Reject(request_id=1, why=Reason.CANCELLED)]
    live.ready(0, SIZES[1])
    arrive(live, 2)
    assert live.cancel(2)[0] == Cancel(engine=0, request_id=2)
    assert live.send(Cancelled(request_id=2)) == []
    live.run_out(SIZES.get)
    live.check_end()


def test_a_lost_engine_fails_what_ran_and_is_replaced():
    live = world()
    arrive(live, 1)
    assert live.lose(0) == [Fail(request_id=1, why=Reason.ENGINE_LOST), StartEngine(engine=1, tp=1)]
    assert arrive(live, 2) == []
    assert names(live.ready(1, SIZES[1]))[0] == "Dispatch"
    assert live.send(EngineLost(engine=0)) == []
    # An engine that does not start is tried again under another id.
    assert live.lose(1)[-1] == StartEngine(engine=2, tp=1)
    assert live.lose(2) == [StartEngine(engine=3, tp=1)]
    arrive(live, 3)
    live.run_out(SIZES.get)
    live.check_end()


def test_a_clock_that_cannot_be_read_means_the_maximum_clock():
    live = world()
    arrive(live, 1)
    (again,) = live.read_clock(0, None)
    assert (again.plan.mhz, again.plan.why) == (TOP_MHZ, Reason.UNKNOWN_STATE)
    assert live.controller.snapshot().engines[0].clock_mhz is None
    assert live.read_clock(7, None) == []


@pytest.mark.parametrize("policy", [ClockPolicy.TOP, ClockPolicy.FIXED])
def test_a_clock_that_is_not_what_was_set_is_set_again(policy):
    live = world(options(policy, aware=False))
    live.now_s = 10.0
    (again,) = live.read_clock(0, 800)
    assert isinstance(again, SetClock) and again.plan.mhz == TOP_MHZ


def test_a_switch_under_way_is_not_set_twice():
    live = world()
    arrive(live, 1)
    assert live.read_clock(0, 1200) == []
    assert live.read_clock(0, CLOCKS_MHZ[0]) == []


def test_a_timer_plans_again_and_moves_on():
    live = world()
    arrive(live, 1, 4, 60)
    assert live.controller.next_deadline() == 1.0
    live.now_s = 1.0
    live.send(Timer())
    assert live.controller.next_deadline() == 2.0


def test_an_unknown_engine_changes_nothing():
    controller = Controller(options())
    assert handle(controller, Stepped(engine=4, iteration=0, finished=(1,)), 0.0) == []
    assert handle(controller, EngineLost(engine=4), 0.0) == []
    assert controller.projection(4) is None and controller.serving() is None


def test_the_same_engine_is_ready_only_once():
    live = world()
    arrive(live, 1)
    assert handle(live.controller, EngineReady(engine=0, spec=SIZES[1]), 0.0) == []
    live.run_out(SIZES.get)
    live.check_end()


def test_an_unchanged_iteration_is_o1():
    def lines(count):
        large = spec(kv_blocks=100_000, max_batch=1000, prefill_budget_tokens=100_000)
        controller = Controller(options(ClockPolicy.TOP, aware=False))
        handle(controller, EngineReady(engine=0, spec=large), 0.0)
        for key in range(count):
            handle(controller, Arrived(request=request(key, 4, 90)), 0.0)
        handle(controller, Stepped(engine=0, iteration=0, started=tuple(range(count))), 0.1)
        return lines_executed(lambda: handle(controller, Stepped(engine=0, iteration=1), 0.2))

    assert lines(300) == lines(3)


def test_a_cancelled_batch_leaves_no_iteration_in_progress():
    """Slack is counted from the iteration in progress; one whose requests were all cancelled has no beginning."""
    plans = []
    for cancelled in (False, True):
        live = world()
        arrive(live, 0, 4, 8)
        live.end_iteration(0)
        if cancelled:
            live.cancel(0)
        else:
            while live.on:
                live.end_iteration(0)
        live.now_s = 30.0
        commands = arrive(live, 1, 4, 100, slo=Slo(e2e_s=2.0))
        plans.append((names(commands), live.controller.snapshot().engines[0].plan))
    assert plans[0] == plans[1]


# ---- progress ----------------------------------------------------------------------------------------------


def view(live):
    return live.controller.snapshot().engines[0]


def step(live, times=1):
    for _ in range(times):
        live.end_iteration(0)


def test_a_lagging_sequence_is_planned_for_longer_with_the_next_iteration():
    live = world()
    arrive(live, 1, 4, 20)
    step(live, 6)
    assert live.send(Progressed(engine=0, request_id=1, tokens=3)) == []
    step(live)
    # 7 iterations, 4 tokens: 16 to come.
    assert live.controller.projection(0).horizon == 16
    assert (view(live).kv_blocks, view(live).drift.corrections) == (2, 1)
    live.run_out(SIZES.get)
    assert live.controller.snapshot().counts.finished == 1


def test_a_pending_request_with_tokens_begins_and_is_planned_at_once():
    live = world()
    arrive(live, 1, 4, 20)
    live.send(Progressed(engine=0, request_id=1, tokens=2))
    assert (view(live).running, view(live).pending) == (1, 0)
    assert live.controller.projection(0).horizon == 18


@pytest.mark.parametrize(("tokens", "horizon"), [(-3, 19), (0, 19), (1, 19), (500, 1)])
def test_a_request_has_at_least_one_token_and_at_most_max_tokens(tokens, horizon):
    live = world()
    arrive(live, 1, 4, 20)
    live.send(Progressed(engine=0, request_id=1, tokens=tokens))
    assert live.controller.projection(0).horizon == horizon


def test_progress_of_an_unknown_request_is_ignored():
    live = world()
    arrive(live, 1)
    before = live.controller.snapshot()
    assert live.send(Progressed(engine=0, request_id=9, tokens=4)) == []
    assert live.send(Progressed(engine=5, request_id=1, tokens=4)) == []
    assert live.send(Observed(engine=5, running=4, waiting=0)) == []
    assert live.controller.snapshot() == before
