"""Gathering: the hold that is planned from table and load, and requests that are held, released and never forgotten."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.stories import SIZES, arrive, hold_plan, options, world
from core.toy import sequence, spec, table
from throttllem.core.clocks.gathering import Flow, Gathering, HoldPlan, plan_hold
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.controller import Controller
from throttllem.core.options import AdmissionOptions, Unmeetable
from throttllem.core.types import Dispatch, Reason, ShuttingDown, Slo

SPEC = spec(kv_blocks=512, max_batch=64, max_context_tokens=512)
TABLE = table(SPEC, kv_step=32)
LIGHT = Flow(
    waiting_per_s=0.3,
    others_per_s=0.0,
    prompt_tokens=8.0,
    lengths=np.linspace(10.0, 100.0, 64),
    predicted_tokens=np.linspace(10.0, 100.0, 64),
    e2e_s=60.0,
    ttft_s=math.inf,
    tbt_s=math.inf,
    most_s=120.0,
)
LEAST = ClockPolicy.LEAST_ENERGY
BATCH = Slo(batch=True)


def planned(margin=0.05, spec=SPEC, **changes):
    return plan_hold(replace(LIGHT, **changes), TABLE, spec, margin=margin)


# ---- the plan ----------------------------------------------------------------------------------------------


def test_light_load_is_gathered_for_less_power():
    plan = planned()
    assert plan is not None
    assert plan.hold_s > 5.0
    assert SPEC.idle_w < plan.watts < 0.9 * plan.watts_at_once


def test_the_power_at_once_is_that_of_an_engine_which_is_idle_between_requests():
    """So few requests come that two never meet: idle, but for one sequence at the cheapest clock."""
    bare = replace(SPEC, idle_w=5.0)
    plan = planned(waiting_per_s=0.01, e2e_s=4000.0, most_s=3600.0, spec=bare)
    tokens = float(LIGHT.lengths.mean())
    alone = TABLE.cell(1, round(0.5 + (8 + tokens / 2) / SPEC.block_tokens), 0)
    seconds, watts = TABLE.seconds[alone].astype(float), TABLE.watts[alone].astype(float)
    least = bare.idle_w + 0.01 * tokens * float((seconds * (watts - bare.idle_w)).min())
    assert plan.watts_at_once == pytest.approx(least, rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"spec": replace(SPEC, idle_w=110.0)},
        {"others_per_s": 20.0},
        {"waiting_per_s": 1e-4},
        {"most_s": 1.0},
        {"e2e_s": 3.0},
        {"ttft_s": 0.5},
        {"tbt_s": 0.001},
    ],
    ids=["idle draws as much", "busy anyway", "too few", "not allowed", "E2E", "TTFT", "TBT"],
)
def test_nothing_is_held_where_it_does_not_pay_or_not_meet_slos(changes):
    assert planned() is not None
    assert planned(**changes) is None


@given(
    rate=st.floats(0.02, 5.0),
    others=st.floats(0.0, 3.0),
    e2e_s=st.floats(3.0, 300.0),
    ttft_s=st.floats(1.0, 300.0),
    margin=st.floats(0.0, 0.5),
)
def test_the_planned_clock_leaves_time_for_the_slos(rate, others, e2e_s, ttft_s, margin):
    changes = {"waiting_per_s": rate, "others_per_s": others, "e2e_s": e2e_s, "ttft_s": ttft_s}
    plan = planned(margin=margin, **changes)
    if plan is not None:
        keep = 1.0 - margin
        assert plan.start_s <= ttft_s * keep
        assert plan.start_s + np.quantile(LIGHT.lengths, 0.99) * plan.token_s <= e2e_s * keep + 1e-9
        assert plan.watts < plan.watts_at_once


@given(
    slo=st.builds(
        Slo, e2e_s=st.none() | st.floats(0.1, 100.0), ttft_s=st.none() | st.floats(0.1, 100.0), batch=st.just(True)
    ),
    output=st.integers(1, 200),
    hold_s=st.floats(0.5, 60.0),
    margin=st.floats(0.0, 0.5),
)
def test_a_request_is_held_no_longer_than_its_slos_allow(slo, output, hold_s, margin):
    gathering = Gathering(window_s=60.0)
    gathering.plan = HoldPlan(hold_s=hold_s, start_s=0.7, token_s=0.03, watts=50.0, watts_at_once=100.0)
    made = sequence(1, 4, output, arrival_s=10.0, slo=slo)
    until_s = gathering.hold_until_s(made, margin=margin)
    assert until_s <= 10.0 + hold_s
    if until_s > 10.0:
        assert until_s + 0.7 <= 10.0 + (slo.ttft_s or math.inf) + 1e-9
        assert until_s + 0.7 + output * 0.03 <= 10.0 + (slo.e2e_s or math.inf) + 1e-9


def test_the_load_of_requests_that_can_wait_makes_the_plan():
    def after(batch, seconds=200):
        live = world(options(LEAST))
        gathering = Gathering(window_s=60.0)
        for second in range(seconds):
            gathering.arrived(sequence(second, 8, 30, slo=Slo(batch=batch, e2e_s=60.0)), float(second))
            gathering.finished(30)
        engine = live.controller.state().engines[0]
        engine.spec, engine.table = SPEC, TABLE
        gathering.renew(engine, float(seconds), most_s=60.0, margin=0.05)
        return gathering

    found = after(batch=True)
    assert found.in_force(200.0) is found.plan is not None
    assert found.in_force(300.0) is None, "no request that can wait came for a minute"
    assert after(batch=False).plan is None
    assert after(batch=True, seconds=20).plan is None, "the load is not known yet"
    found.closing = True
    assert found.in_force(200.0) is None


# ---- through the controller --------------------------------------------------------------------------------


def holding(hold_s=5.0, **changes):
    live = world(options(LEAST, **changes))
    hold_plan(live, hold_s=hold_s)
    return live


def dispatched(commands):
    return [command.request_id for command in commands if isinstance(command, Dispatch)]


def test_requests_that_can_wait_are_held_and_run_together():
    live = holding()
    assert dispatched(arrive(live, 1, slo=BATCH)) == []
    live.advance(3.0)
    assert dispatched(arrive(live, 2, slo=BATCH)) == []
    seen = live.controller.snapshot()
    assert (seen.queue, seen.held, seen.hold.hold_s, seen.head.why) == (2, 2, 5.0, Reason.GATHERING)
    live.advance(1.9)
    assert not live.on
    live.advance(0.2)
    assert live.on.keys() == {1, 2}
    assert live.controller.snapshot().held == 0
    live.run_out(SIZES.get)


def test_held_requests_do_not_raise_the_clock():
    live = holding()
    arrive(live, 1, 4, 8)
    arrive(live, 2, 4, 40, slo=BATCH)
    assert live.controller.snapshot().held == 1
    assert live.controller.snapshot().engines[0].plan.why is not Reason.WAITING


def test_a_request_without_batch_is_never_held_and_passes_those_that_are():
    live = holding()
    arrive(live, 1, 4, 30, slo=BATCH)
    assert dispatched(arrive(live, 2, 4, 8)) == [2]
    assert live.controller.snapshot().held == 1


def test_held_requests_join_at_once_where_the_engine_runs_as_long_anyway():
    live = holding()
    arrive(live, 1, 4, 8, slo=BATCH)
    arrive(live, 2, 4, 60, slo=BATCH)
    assert dispatched(arrive(live, 3, 4, 30)) == [3, 1]
    assert dispatched(arrive(live, 4, 4, 6, slo=BATCH)) == [4]
    assert live.controller.snapshot().held == 1


def test_a_hold_ends_before_the_slo_of_any_held_request_needs_it():
    live = holding(hold_s=50.0)
    arrive(live, 1, slo=BATCH)
    arrive(live, 2, 4, 40, slo=Slo(e2e_s=3.0, batch=True))
    live.advance(2.2)
    assert live.on.keys() == {1, 2}, "40 tokens at 20 ms and the margin before 3 s"
    live.run_out(SIZES.get)
    assert live.now_s < 3.1


def test_a_request_whose_slo_leaves_no_time_is_not_held():
    live = holding()
    assert dispatched(arrive(live, 1, 4, 40, slo=Slo(e2e_s=0.8, batch=True))) == [1]


def test_a_full_gathering_is_released():
    live = holding(hold_s=500.0)
    for key in range(1, 9):
        arrive(live, key, 4, 8, slo=BATCH)
    assert live.on.keys() == set(range(1, 9)), "the batch holds eight"


def test_the_client_of_a_held_request_disconnects():
    live = holding()
    arrive(live, 1, slo=BATCH)
    live.advance(1.0)
    arrive(live, 2, slo=BATCH)
    live.cancel(1)
    assert live.controller.next_deadline() == 6.0
    live.cancel(2)
    assert live.controller.next_deadline() is None
    assert live.controller.snapshot().head is None


def test_at_shutdown_held_requests_are_released_and_none_is_held_any_more():
    live = holding()
    arrive(live, 1, slo=BATCH)
    assert dispatched(live.send(ShuttingDown())) == [1]
    assert dispatched(arrive(live, 2, slo=BATCH)) == [2]


def test_held_requests_wait_for_an_engine_when_theirs_is_lost():
    live = holding()
    arrive(live, 1, slo=BATCH)
    live.lose(0)
    seen = live.controller.snapshot()
    assert (seen.queue, seen.held, seen.head.why) == (1, 0, Reason.NO_ENGINE)
    live.run_out(SIZES.get)


@pytest.mark.parametrize("policy", [ClockPolicy.THROTTLLEM, ClockPolicy.TOP])
def test_other_policies_hold_nothing(policy):
    live = world(options(policy, aware=policy is not ClockPolicy.TOP))
    hold_plan(live, hold_s=5.0)
    assert dispatched(arrive(live, 1, slo=BATCH)) == [1]


def test_without_a_table_nothing_is_held():
    live = world(options(LEAST, tables={}))
    hold_plan(live, hold_s=5.0)
    assert dispatched(arrive(live, 1, slo=BATCH)) == [1]


def test_the_queue_limit_counts_held_requests():
    live = holding(admission=AdmissionOptions(queue_limit=1))
    arrive(live, 1, slo=BATCH)
    arrive(live, 2, slo=BATCH)
    assert live.ended == {2: "rejected"}


def test_patience_counts_from_the_release():
    """Held for most of its SLO, it still waits for a place like one that has just come, and is not rejected."""
    rejecting = AdmissionOptions(unmeetable=Unmeetable.REJECT)
    live = holding(admission=rejecting)
    arrive(live, 1, 4, 8, slo=Slo(e2e_s=8.0, batch=True))
    live.advance(3.0)
    arrive(live, 2, 100, 20)  # it takes the KV blocks, and the held one joins the queue: the engine runs anyway
    seen = live.controller.snapshot()
    assert (seen.queue, seen.held, seen.head.why) == (1, 0, Reason.KV)
    live.run_out(SIZES.get)
    assert live.ended == {1: "finished", 2: "finished"}


def test_another_controller_continues_a_hold():
    live = holding()
    arrive(live, 1, slo=BATCH)
    again = Controller.from_state(live.fresh(), live.controller.state())
    assert again.snapshot() == live.controller.snapshot()
    assert again.next_deadline() == 5.0
