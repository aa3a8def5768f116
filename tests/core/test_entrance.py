"""Who is turned away rather than served late, when the options say so, and when the client hears of it."""

import math
from dataclasses import replace

import pytest

from core.stories import SIZES, TABLES, arrive, names, options, world
from core.toy import TOP_MHZ
from core.world import World
from throttllem.core.admission import AdmissionOptions, Unmeetable
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.types import EngineLost, Reason, Reject, Slo, Timer, VerdictKind

REJECT = AdmissionOptions(unmeetable=Unmeetable.REJECT, reject_margin=0.05, reject_patience=0.2)
LATE = Reason.OWN_DEADLINE


def rejecting(**changes):
    return world(options(admission=REJECT, **changes))


@pytest.mark.parametrize("slo", [Slo(e2e_s=0.001), Slo(tbt_s=0.001), Slo(ttft_s=0.001)])
def test_what_can_never_be_met_is_rejected_at_once(slo):
    told = rejecting()
    assert Reject(request_id=1, why=LATE) in arrive(told, 1, 4, 8, slo=slo)
    assert told.ended == {1: "rejected"}
    assert told.controller.snapshot().counts.lost == 0
    told.check_end()


def test_who_is_found_lost_when_its_turn_comes_is_rejected():
    """Alone it would have been in time; beside the other one it is not."""
    told = rejecting()
    arrive(told, 1, 40, 40)
    for _ in range(3):
        told.end_iteration(0)
    # 8 tokens at about 17 ms: the bound for one alone is some 0.11 s, in this company it is 0.125 s and a switch.
    commands = arrive(told, 2, 4, 8, slo=Slo(e2e_s=0.12))
    assert Reject(request_id=2, why=LATE) in commands
    assert told.on == {1: 0}
    told.run_out(SIZES.get)
    told.check_end()


def test_the_clients_of_a_long_queue_hear_early():
    """No place for an hour: whoever has an end gives up when it comes, from the middle of the queue too."""
    told = world(options(admission=replace(REJECT, reject_patience=math.inf)))
    arrive(told, 1, 60, 40)
    arrive(told, 2, 60, 40)
    assert told.controller.snapshot().head.why is Reason.KV
    for key, e2e_s in ((3, 30.0), (4, 10.0), (5, 20.0)):
        arrive(told, key, 4, 8, slo=Slo(e2e_s=e2e_s))
    heard = []
    for _ in range(40):
        told.advance(1.0)
        heard += [(key, told.now_s) for key in told.ended if key not in dict(heard)]
    assert heard == [(4, 10.0), (5, 20.0), (3, 30.0)]
    (at_s,) = (now_s for now_s, _, commands in told.log if Reject(request_id=4, why=LATE) in commands)
    assert 9.8 < at_s < 10.0, "as soon as it cannot be met, not when it is missed"
    told.run_out(SIZES.get)
    told.check_end()


def test_the_clock_may_fall_again_when_the_last_one_has_given_up():
    told = rejecting()
    arrive(told, 1, 60, 40)
    arrive(told, 2, 60, 40, slo=Slo(e2e_s=4.0))
    assert told.controller.snapshot().engines[0].plan.why is Reason.WAITING
    told.now_s = told.controller.next_deadline()
    while told.waiting:
        told.now_s = told.controller.next_deadline()
        commands = told.tell(Timer())
    assert names(commands) == ["Reject", "SetClock"]
    assert commands[1].plan.mhz < TOP_MHZ


def tight(told):
    """One row runs whose promise leaves no room for a long prompt, though it does for a short one."""
    arrive(told, 1, 4, 20, slo=Slo(e2e_s=0.31))
    for _ in range(2):
        told.end_iteration(0)


def test_nobody_joins_at_the_cost_of_others():
    """Where all are served, one joins when its patience ends; here it is turned away, and the other keeps its time."""
    told = rejecting()
    tight(told)
    arrive(told, 2, 60, 30, slo=Slo(e2e_s=1.0))
    head = told.controller.snapshot().head
    assert (head.kind, head.why, head.binding) == (VerdictKind.WAIT, Reason.E2E, 1)
    until_s = told.now_s + 0.2
    while told.waiting:
        told.now_s = told.controller.next_deadline()
        told.tell(Timer())
    assert told.now_s == pytest.approx(until_s)
    assert any(Reject(request_id=2, why=Reason.HELD_BACK) in commands for _, _, commands in told.log)
    told.run_out(SIZES.get)
    assert told.ended == {1: "finished", 2: "rejected"}
    assert told.controller.snapshot().counts.lost == 0


def test_who_is_held_back_holds_back_nobody_lighter():
    told = rejecting()
    tight(told)
    arrive(told, 2, 60, 30, slo=Slo(e2e_s=2.0))
    arrive(told, 3, 61, 30, slo=Slo(e2e_s=2.0))
    assert list(told.waiting) == [2, 3]
    assert "Dispatch" in names(arrive(told, 4, 1, 2, slo=Slo(e2e_s=2.0)))
    assert list(told.waiting) == [2, 3]
    told.run_out(SIZES.get)
    told.check_end()


def test_who_waits_without_an_end_is_not_passed():
    told = rejecting()
    tight(told)
    arrive(told, 2, 60, 30)
    assert names(arrive(told, 3, 1, 2, slo=Slo(e2e_s=2.0))) == []
    assert list(told.waiting) == [2, 3]
    told.run_out(SIZES.get)
    assert told.ended == {1: "finished", 2: "finished", 3: "finished"}


def test_without_an_engine_they_give_up_too_but_not_where_nothing_is_known_of_the_speed():
    told = World(options(admission=REJECT))
    assert arrive(told, 1, slo=Slo(e2e_s=1.0)) == []
    told.advance(2.0)
    assert told.ended == {1: "rejected"}
    dark = World(options(admission=REJECT, tables={}))
    dark.ready(0, SIZES[1])
    assert names(arrive(dark, 1, 4, 8, slo=Slo(e2e_s=0.001)))[0] == "Dispatch"
    half = World(options(admission=REJECT, tables={2: TABLES[2]}))
    half.ready(0, SIZES[1])
    for key in range(12):
        arrive(half, key, 4, 8, slo=Slo(e2e_s=0.5))
    half.advance(5.0)
    assert half.waiting and "rejected" not in half.ended.values(), "the engine that serves was never profiled"
    half.run_out(SIZES.get)


def test_who_was_let_in_in_time_is_served_though_it_is_lost_later():
    told = rejecting()
    assert "Dispatch" in names(arrive(told, 1, 4, 8, slo=Slo(e2e_s=1.0)))
    told.now_s = 5.0
    told.end_iteration(0)
    assert told.controller.snapshot().engines[0].lost_requests == 1
    told.run_out(SIZES.get)
    assert told.ended == {1: "finished"}
    assert told.controller.snapshot().counts.lost == 1


def test_the_baseline_and_the_default_turn_nobody_away():
    for found in (options(), options(ClockPolicy.TOP, aware=False, admission=REJECT)):
        told = world(found)
        assert names(arrive(told, 1, 4, 8, slo=Slo(e2e_s=0.001)))[0] == "Dispatch"
        told.run_out(SIZES.get)
        assert told.ended == {1: "finished"}


def test_what_gave_up_is_not_spoken_of_again():
    told = World(options(admission=REJECT))
    arrive(told, 1, slo=Slo(e2e_s=1.0))
    told.advance(2.0)
    assert told.controller.next_deadline() is None
    assert told.tell(EngineLost(engine=0)) == []
    assert told.controller.snapshot().head is None


def test_no_more_sequences_than_the_engine_runs_side_by_side():
    told = world()
    assert arrive(told, 1, 1, 1, sequences=9) == [Reject(request_id=1, why=Reason.BATCH)]
    dispatch, _ = arrive(told, 2, 4, 8, sequences=6)
    assert dispatch.request_id == 2
    arrive(told, 3, 1, 1, sequences=3)
    snapshot = told.controller.snapshot()
    assert (snapshot.head.kind, snapshot.head.why) == (VerdictKind.WAIT, Reason.BATCH)
    told.run_out(SIZES.get)
    told.check_end()
    dark = world(options(tables={}))
    arrive(dark, 1, 1, 2, sequences=6)
    arrive(dark, 2, 1, 1, sequences=3)
    assert list(dark.waiting) == [2]


@pytest.mark.parametrize(("margin", "reject_margin", "dispatched"), [(0.5, 0.0, True), (0.0, 0.5, False)])
def test_the_margin_that_holds_is_that_of_those_who_reject(margin, reject_margin, dispatched):
    """Row 1 takes 0.97 s for its 60 tokens alone, 1.1 s beside another: it keeps 1.5 s, but not half of them."""
    told = world(options(admission=replace(REJECT, margin=margin, reject_margin=reject_margin)))
    arrive(told, 1, 4, 60, slo=Slo(e2e_s=1.5))
    assert ("Dispatch" in names(arrive(told, 2, 4, 60))) == dispatched
