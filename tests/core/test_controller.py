"""The controller, event by event; the state machine looks for the rest."""

import pytest

from core.effort import calls_executed, lines_executed
from core.stories import SIZES, arrive, names, options, scaling, world
from core.toy import CLOCKS_MHZ, SPEC, TOP_MHZ, handle, request, spec
from core.world import World
from throttllem.core.clocks.controller import ClockController
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.controller import Controller, PlanningError
from throttllem.core.forecast.margins import Cause
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.options import AdmissionOptions
from throttllem.core.types import (
    Arrived,
    Cancel,
    Cancelled,
    ClockRead,
    Dispatch,
    EngineLost,
    EngineReady,
    Fail,
    Observed,
    Progressed,
    RateChanged,
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


def test_the_way_of_an_event_is_short():
    """Without a performance table, and with a predictor that learns: what a live gateway has at first."""
    controller = Controller(
        options(ClockPolicy.LEAST_ENERGY, tables={}, predictor=OnlineLengthPredictor(OnlineLengthOptions()))
    )
    handle(controller, EngineReady(engine=0, spec=SIZES[1]), 0.0)

    def calls(event, now_s):
        """Calls and files of the event, and calls of the timer after it."""
        entered = calls_executed(lambda: controller.handle(event, now_s))
        needs_timer = controller.next_deadline() == now_s
        planned = calls_executed(lambda: controller.handle(Timer(), now_s)) if needs_timer else []
        return len(entered), len(set(entered)), len(planned)

    for key in range(3):
        arrived = calls(Arrived(request=request(key, 4, 8)), 1.0 + key)
        started = calls(Stepped(engine=0, iteration=2 * key, started=(key,)), 1.1 + key)
        bare = calls(Stepped(engine=0, iteration=2 * key + 1), 1.2 + key)
        assert all(had <= most for had, most in zip(arrived, (22, 5, 0), strict=True)), arrived
        assert all(had <= most for had, most in zip(started, (12, 2, 0), strict=True)), started
        assert all(had <= most for had, most in zip(bare, (3, 2, 0), strict=True)), bare


def test_a_plan_that_fails_names_its_engine_and_the_others_keep_their_turn(monkeypatch):
    live = world()
    arrive(live, 1)
    live.ready(1, SIZES[2])
    plan, controller = ClockController.plan, live.controller

    def failing(clocks, engine, now_s, *, waiting):
        if engine.engine == 0:
            raise OverflowError("numbers that make no sense")
        return plan(clocks, engine, now_s, waiting=waiting)

    monkeypatch.setattr(ClockController, "plan", failing)
    for key in (0, 1):
        assert controller.handle(ClockRead(engine=key, mhz=None), live.now_s) == []
    with pytest.raises(PlanningError, match="engine 0") as raised:
        controller.handle(Timer(), live.now_s)
    assert raised.value.engine == 0
    assert controller.next_deadline() == live.now_s
    (command,) = controller.handle(Timer(), live.now_s)
    assert (command.engine, command.plan.why) == (1, Reason.UNKNOWN_STATE)
    assert controller.next_deadline() > live.now_s, "the plan that failed is not tried again at once"
    for key in (1, 0):
        controller.handle(ClockRead(engine=key, mhz=None), live.now_s)
    (command,) = controller.handle(Timer(), live.now_s)
    assert command.engine == 1, "commands of the others are not lost"
    with pytest.raises(PlanningError, match="engine 0"):
        controller.handle(Timer(), live.now_s)


def test_what_the_gateway_reads_at_every_step():
    live = world()
    assert (live.controller.kv_blocks(0), live.controller.kv_blocks(7), live.controller.waiting()) == (0, 0, 0)
    arrive(live, 1, 60, 40)
    arrive(live, 2, 60, 40)
    live.end_iteration(0)
    snapshot = live.controller.snapshot()
    assert (live.controller.kv_blocks(0), live.controller.waiting()) == (snapshot.engines[0].kv_blocks, 1) == (15, 1)


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


# ---- engines that speculate --------------------------------------------------------------------------------------


def test_what_only_speculation_makes_in_time_is_not_lost_and_runs_below_the_maximum_clock():
    """At 14 ms a step and a token a step, 100 tokens take 1.4 s."""
    tight = Slo(e2e_s=1.2)
    plain, speculates = world(), world()
    speculates.send(RateChanged(engine=0, tokens_per_step=3.0))
    for live in (plain, speculates):
        arrive(live, 1, 4, 100, slo=tight)
    assert (view(plain).lost_requests, view(speculates).lost_requests) == (1, 0)
    assert plain.up[0].set_mhz == TOP_MHZ > speculates.up[0].set_mhz
    # It stops: the next plan knows.
    speculates.send(RateChanged(engine=0, tokens_per_step=1.0))
    assert speculates.up[0].set_mhz == TOP_MHZ


def test_the_time_between_tokens_is_that_part_of_a_step():
    live = world()
    live.send(RateChanged(engine=0, tokens_per_step=3.0))
    arrive(live, 1, 4, 100, slo=Slo(tbt_s=0.008))
    assert view(live).lost_requests == 0
    live.send(RateChanged(engine=99, tokens_per_step=3.0))


@pytest.mark.parametrize(("mhz", "learned"), [(TOP_MHZ, False), (CLOCKS_MHZ[0], True)])
def test_a_violation_teaches_the_clocks_only_below_the_maximum(mhz, learned):
    controller = Controller(options(ClockPolicy.LEAST_ENERGY))
    handle(controller, EngineReady(engine=0, spec=SIZES[1]), 0.0)
    handle(controller, ClockRead(engine=0, mhz=mhz), 0.0)
    keys = (1, 2, 3)
    for key in keys:
        handle(controller, Arrived(request=request(key, 4, 8, slo=Slo(e2e_s=0.5))), 0.0)
    handle(controller, Stepped(engine=0, iteration=0, started=keys), 0.1)
    handle(controller, Stepped(engine=0, iteration=7, finished=keys), 1.0)
    (seen,) = controller.snapshot().attainment
    assert (seen.ended, seen.had) == (3, 0.0)
    assert (dict(seen.learned)[Cause.MODEL] > 0) == learned


def test_engine_sizes_follow_the_requests_that_some_size_can_hold():
    live = World(scaling(throttle=ThrottleOptions(policy=ClockPolicy.LEAST_ENERGY)))
    live.ready(0, SIZES[1])
    arrive(live, 1)
    arrive(live, 2, 1000, 8)
    assert live.ended == {2: "rejected"}
    assert live.controller.state().size_planner.forecast.count == 1
