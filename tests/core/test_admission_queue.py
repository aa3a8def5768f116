"""The admission queue: order and expiry against a plain list, and which requests are rejected, not served late."""

import math
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.effort import lines_executed
from core.stories import SIZES, TABLES, arrive, names, options, world
from core.toy import TOP_MHZ, sequence
from core.world import World
from throttllem.core.admission import AdmissionQueue
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.forecast.margins import Margins
from throttllem.core.options import AdmissionOptions, ControllerOptions, Unmeetable
from throttllem.core.types import EngineLost, Reason, Reject, Slo, Timer, VerdictKind

# ---- the queue alone ---------------------------------------------------------------------------------------


LONG_PATIENCE = AdmissionOptions(unmeetable=Unmeetable.REJECT, reject_patience=1.0)
QUEUE_OPTIONS = ControllerOptions(throttle=ThrottleOptions(), admission=LONG_PATIENCE)


def waiting(key, expiry_s):
    """A request whose patience ends at that time."""
    slo = Slo() if expiry_s == math.inf else Slo(e2e_s=1.0)
    arrival_s = 0.0 if expiry_s == math.inf else expiry_s - 1.0
    return sequence(key, 4, 4, arrival_s=arrival_s, slo=slo)


class QueueMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.queue = AdmissionQueue(QUEUE_OPTIONS, Margins())
        self.model = []
        self.came = 0
        self.now_s = 0.0

    @rule(wait_s=st.sampled_from([math.inf, 0.0, 1.0, 5.0, 5.0, 30.0]))
    def push(self, wait_s):
        self.queue.push(waiting(self.came, self.now_s + wait_s))
        self.model.append((self.came, self.now_s + wait_s))
        self.came += 1

    @rule(request_id=st.integers(0, 30))
    def take(self, request_id):
        found = self.queue.take(request_id)
        here = [key for key, _ in self.model if key == request_id]
        assert ([found.request.id] if found else []) == here
        self.model = [held for held in self.model if held[0] != request_id]

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 25.0]))
    def wait(self, seconds):
        self.now_s += seconds
        gone = [held.request.id for held, _ in self.queue.expire(self.now_s)]
        late = sorted((end_s, key) for key, end_s in self.model if end_s <= self.now_s)
        assert gone == [key for _, key in late]
        self.model = [held for held in self.model if held[1] > self.now_s]

    @invariant()
    def agrees_with_the_list(self):
        assert list(self.queue.waiting) == [key for key, _ in self.model]
        assert self.queue.next_expiry_s == min((end_s for _, end_s in self.model), default=math.inf)


TestQueue = QueueMachine.TestCase


def test_requests_that_left_are_forgotten_though_the_head_stays():
    queue = AdmissionQueue(QUEUE_OPTIONS, Margins())
    queue.push(waiting(0, 1e9))
    for key in range(1, 10_000):
        queue.push(waiting(key, 1e6 + key))
        queue.take(key)
    assert len(queue.waiting) == 1
    assert len(queue._expiries) < 200


def test_leaving_from_the_middle_is_independent_of_the_others():
    def lines(count):
        queue = AdmissionQueue(QUEUE_OPTIONS, Margins())
        for key in range(count):
            queue.push(waiting(key, 100.0 + key))
        return lines_executed(lambda: queue.take(count // 2))

    assert lines(3000) == lines(30)


# ---- through the controller --------------------------------------------------------------------------------


REJECT = AdmissionOptions(unmeetable=Unmeetable.REJECT, reject_margin=0.05, reject_patience=0.2)
LATE = Reason.OWN_DEADLINE


def rejecting(**changes):
    return world(options(admission=REJECT, **changes))


@pytest.mark.parametrize("slo", [Slo(e2e_s=0.001), Slo(tbt_s=0.001), Slo(ttft_s=0.001)])
def test_a_request_that_can_never_be_met_is_rejected_at_once(slo):
    live = rejecting()
    assert Reject(request_id=1, why=LATE) in arrive(live, 1, 4, 8, slo=slo)
    assert live.ended == {1: "rejected"}
    assert live.controller.snapshot().counts.lost == 0
    live.check_end()


def test_a_request_that_is_lost_when_its_turn_comes_is_rejected():
    """Alone it would have been in time; beside the other one it is not."""
    live = rejecting()
    arrive(live, 1, 40, 40)
    for _ in range(3):
        live.end_iteration(0)
    # 8 tokens at about 17 ms: the bound for one alone is some 0.11 s, in this company it is 0.125 s and a switch.
    commands = arrive(live, 2, 4, 8, slo=Slo(e2e_s=0.12))
    assert Reject(request_id=2, why=LATE) in commands
    assert live.on == {1: 0}
    live.run_out(SIZES.get)
    live.check_end()


def test_requests_in_a_long_queue_expire_early():
    """No room for an hour: requests expire when they cannot be met any more, from the middle of the queue too."""
    live = world(options(admission=replace(REJECT, reject_patience=math.inf)))
    arrive(live, 1, 60, 40)
    arrive(live, 2, 60, 40)
    assert live.controller.snapshot().head.why is Reason.KV
    for key, e2e_s in ((3, 30.0), (4, 10.0), (5, 20.0)):
        arrive(live, key, 4, 8, slo=Slo(e2e_s=e2e_s))
    expired = []
    for _ in range(40):
        live.advance(1.0)
        expired += [(key, live.now_s) for key in live.ended if key not in dict(expired)]
    assert expired == [(4, 10.0), (5, 20.0), (3, 30.0)]
    (at_s,) = (now_s for now_s, _, commands in live.log if Reject(request_id=4, why=LATE) in commands)
    assert 9.8 < at_s < 10.0, "as soon as it cannot be met, not when it is violated"
    live.run_out(SIZES.get)
    live.check_end()


def test_the_clock_may_fall_again_when_the_last_one_has_expired():
    live = rejecting()
    arrive(live, 1, 60, 40)
    arrive(live, 2, 60, 40, slo=Slo(e2e_s=4.0))
    assert live.controller.snapshot().engines[0].plan.why is Reason.WAITING
    live.now_s = live.controller.next_deadline()
    while live.waiting:
        live.now_s = live.controller.next_deadline()
        commands = live.send(Timer())
    assert names(commands) == ["Reject", "SetClock"]
    assert commands[1].plan.mhz < TOP_MHZ


def tight(live):
    """One request runs whose SLO leaves no time for a long prompt, though it does for a short one."""
    arrive(live, 1, 4, 20, slo=Slo(e2e_s=0.31))
    for _ in range(2):
        live.end_iteration(0)


def test_no_request_joins_at_the_cost_of_others():
    """Where all are served, one joins when its patience ends; here it is rejected, and the other meets its SLO."""
    live = rejecting()
    tight(live)
    arrive(live, 2, 60, 30, slo=Slo(e2e_s=1.0))
    head = live.controller.snapshot().head
    assert (head.kind, head.why, head.binding) == (VerdictKind.WAIT, Reason.E2E, 1)
    until_s = live.now_s + 0.2
    while live.waiting:
        live.now_s = live.controller.next_deadline()
        live.send(Timer())
    assert live.now_s == pytest.approx(until_s)
    assert any(Reject(request_id=2, why=Reason.HELD_BACK) in commands for _, _, commands in live.log)
    live.run_out(SIZES.get)
    assert live.ended == {1: "finished", 2: "rejected"}
    assert live.controller.snapshot().counts.lost == 0


def test_a_request_that_is_held_back_holds_back_no_lighter_one():
    live = rejecting()
    tight(live)
    arrive(live, 2, 60, 30, slo=Slo(e2e_s=2.0))
    arrive(live, 3, 61, 30, slo=Slo(e2e_s=2.0))
    assert list(live.waiting) == [2, 3]
    assert "Dispatch" in names(arrive(live, 4, 1, 2, slo=Slo(e2e_s=2.0)))
    assert list(live.waiting) == [2, 3]
    live.run_out(SIZES.get)
    live.check_end()


def test_a_request_that_never_expires_is_not_passed():
    live = rejecting()
    tight(live)
    arrive(live, 2, 60, 30)
    assert names(arrive(live, 3, 1, 2, slo=Slo(e2e_s=2.0))) == []
    assert list(live.waiting) == [2, 3]
    live.run_out(SIZES.get)
    assert live.ended == {1: "finished", 2: "finished", 3: "finished"}


def test_requests_expire_without_an_engine_but_not_without_a_table():
    live = World(options(admission=REJECT))
    assert arrive(live, 1, slo=Slo(e2e_s=1.0)) == []
    live.advance(2.0)
    assert live.ended == {1: "rejected"}
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


def test_a_request_admitted_in_time_is_served_though_it_is_lost_later():
    live = rejecting()
    assert "Dispatch" in names(arrive(live, 1, 4, 8, slo=Slo(e2e_s=1.0)))
    live.now_s = 5.0
    live.end_iteration(0)
    assert live.controller.snapshot().engines[0].lost_requests == 1
    live.run_out(SIZES.get)
    assert live.ended == {1: "finished"}
    assert live.controller.snapshot().counts.lost == 1


def test_the_baseline_and_the_default_reject_nothing():
    for found in (options(), options(ClockPolicy.TOP, aware=False, admission=REJECT)):
        live = world(found)
        assert names(arrive(live, 1, 4, 8, slo=Slo(e2e_s=0.001)))[0] == "Dispatch"
        live.run_out(SIZES.get)
        assert live.ended == {1: "finished"}


def test_an_expired_request_is_forgotten():
    live = World(options(admission=REJECT))
    arrive(live, 1, slo=Slo(e2e_s=1.0))
    live.advance(2.0)
    assert live.controller.next_deadline() is None
    assert live.send(EngineLost(engine=0)) == []
    assert live.controller.snapshot().head is None


def test_no_more_sequences_than_the_engine_runs_side_by_side():
    live = world()
    assert arrive(live, 1, 1, 1, sequences=9) == [Reject(request_id=1, why=Reason.BATCH)]
    dispatch, _ = arrive(live, 2, 4, 8, sequences=6)
    assert dispatch.request_id == 2
    arrive(live, 3, 1, 1, sequences=3)
    snapshot = live.controller.snapshot()
    assert (snapshot.head.kind, snapshot.head.why) == (VerdictKind.WAIT, Reason.BATCH)
    live.run_out(SIZES.get)
    live.check_end()
    dark = world(options(tables={}))
    arrive(dark, 1, 1, 2, sequences=6)
    arrive(dark, 2, 1, 1, sequences=3)
    assert list(dark.waiting) == [2]


@pytest.mark.parametrize(("margin", "reject_margin", "dispatched"), [(0.5, 0.0, True), (0.0, 0.5, False)])
def test_the_margin_in_force_is_that_of_rejecting(margin, reject_margin, dispatched):
    """Request 1 takes 0.97 s for its 60 tokens alone, 1.1 s beside another: within 1.5 s, but not within half of it."""
    live = world(options(admission=replace(REJECT, margin=margin, reject_margin=reject_margin)))
    arrive(live, 1, 4, 60, slo=Slo(e2e_s=1.5))
    assert ("Dispatch" in names(arrive(live, 2, 4, 60))) == dispatched
