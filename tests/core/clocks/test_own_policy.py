"""Policies of the public interface: what they see, when they are asked, and what becomes of a bad answer."""

import sys

import numpy as np
import pytest

from core.stories import options
from core.toy import request, spec
from throttllem.core.clocks.own_policy import OwnPolicyError, percentile
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.controller import Controller
from throttllem.core.types import Arrived, ClockRead, EngineReady, Reason, SetClock, Slo, Stepped, Timer


class Scripted:
    """Returns the clocks of a list, the last one for ever, and keeps every view."""

    def __init__(self, *clocks):
        self.clocks = list(clocks)
        self.views = []

    def clock_mhz(self, view):
        self.views.append(view)
        return self.clocks.pop(0) if len(self.clocks) > 1 else self.clocks[0]


class Driven:
    """A controller with one toy engine that is up, and a policy."""

    def __init__(self, policy, **changes):
        self.spec = spec(kv_blocks=32)
        self.controller = Controller(options(ClockPolicy.TOP, aware=False, **changes), own=policy)
        self.at(0.0, EngineReady(engine=0, spec=self.spec))

    def at(self, now_s, event):
        commands = self.controller.handle(event, now_s)
        deadline_s = self.controller.next_deadline()
        if deadline_s is not None and deadline_s <= now_s:
            commands = [*commands, *self.controller.handle(Timer(), now_s)]
        return [command for command in commands if isinstance(command, SetClock)]


def test_it_sees_requests_come_run_and_end():
    policy = Scripted(1000)
    driven = Driven(policy)
    slo = Slo(e2e_s=9.0, tbt_s=0.5, ttft_s=2.0)
    driven.at(1.0, Arrived(request=request(1, 8, 3, arrival_s=1.0, slo=slo)))
    driven.at(1.5, Arrived(request=request(2, 4, 3, arrival_s=1.5)))
    view = policy.views[-1]
    assert [(prompt.age_s, prompt.prompt_tokens) for prompt in view.prompts] == [(0.5, 8), (0.0, 4)]
    assert (view.now_s, view.running, view.slo, view.tokens) == (1.5, 0, slo, 0)
    assert view.recent.arrivals_s == (1.0, 1.5)
    assert view.recent.prompt_tokens == 6.0
    assert view.next_prompt_tokens == 12
    driven.at(2.0, Stepped(engine=0, iteration=0, started=(1, 2)))
    view = policy.views[-1]
    assert (view.running, view.prompts, view.tokens) == (2, (), 2)
    assert view.recent.ttft_s == (1.0, 0.5)
    driven.at(2.5, Stepped(engine=0, iteration=1))
    driven.at(3.0, Stepped(engine=0, iteration=2, finished=(1, 2)))
    view = policy.views[-1]
    assert (view.running, view.kv_blocks, view.tokens) == (0, 0, 6)
    assert view.recent.tpot_s == (0.5, 0.5)
    assert view.recent.e2e_s == (2.0, 1.5)
    assert view.recent.output_tokens == 3.0
    assert view.power_w == driven.spec.idle_w
    driven.at(70.0, Timer())
    recent = policy.views[-1].recent
    assert (recent.arrivals_s, recent.ttft_s, recent.e2e_s) == ((), (), ())
    assert (recent.prompt_tokens, recent.output_tokens, recent.requests_per_s) == (None, None, 0.0)


def test_look_ups_are_the_tables():
    policy = Scripted(1000)
    driven = Driven(policy)
    driven.at(1.0, Arrived(request=request(1, 8, 3, arrival_s=1.0)))
    waiting = policy.views[-1]
    table = waiting.table
    assert waiting.iteration_s(8).tolist() == pytest.approx(table.seconds[table.cell(1, 0, 8)].tolist())
    assert waiting.first_token_s().tolist() == waiting.iteration_s(8).tolist()
    column = waiting.clocks_mhz.index(waiting.clock_mhz)
    assert waiting.power_w == waiting.iteration_w(8)[column]
    driven.at(2.0, Stepped(engine=0, iteration=0, started=(1,)))
    view = policy.views[-1]
    assert view.iteration_w().tolist() == pytest.approx(table.watts[table.cell(1, view.kv_blocks, 0)].tolist())
    four = view.iteration_s(running=4)
    assert four.tolist() == pytest.approx(table.seconds[table.cell(4, 4 * view.kv_blocks, 0)].tolist())
    assert view.lowest(four <= four[1]) == view.clocks_mhz[1]
    assert view.lowest(four < 0) == view.cheapest(four < 0, four) == view.clocks_mhz[-1]
    assert view.cheapest(four > 0, four) == view.clocks_mhz[-1]


def test_it_is_asked_at_every_change_and_once_a_second():
    policy = Scripted(1000, 1200, 1200)
    driven = Driven(policy)
    asked = len(policy.views)
    assert [command.plan.mhz for command in driven.at(1.0, Arrived(request=request(1, 8, 3, arrival_s=1.0)))] == [1200]
    assert len(policy.views) == asked + 1
    assert driven.controller.next_deadline() == 2.0
    assert driven.at(2.0, Timer()) == []
    assert len(policy.views) == asked + 2
    engine = driven.controller.snapshot().engines[0]
    assert (engine.plan.mhz, engine.plan.why) == (1200, Reason.OWN_POLICY)


def test_without_a_table_or_a_known_clock_it_is_not_asked():
    policy = Scripted(1000)
    driven = Driven(policy, tables={})
    driven.at(1.0, Arrived(request=request(1, 8, 3, arrival_s=1.0)))
    assert policy.views == []
    assert driven.controller.snapshot().engines[0].plan.why is Reason.NO_TABLE
    lost = Driven(policy)
    asked = len(policy.views)
    lost.at(1.0, ClockRead(engine=0, mhz=None))
    assert len(policy.views) == asked
    assert lost.controller.snapshot().engines[0].plan.why is Reason.UNKNOWN_STATE


@pytest.mark.parametrize("answer", [None, 1001, "1000", 0, -1000, float("nan"), np.array([600, 1000])])
def test_what_is_no_clock_is_an_error(answer):
    with pytest.raises(OwnPolicyError, match=r"policy Scripted: clock_mhz returned .* at 0\.000 s; .*view\.clocks_mhz"):
        Driven(Scripted(answer))


def test_a_failure_names_the_policy():
    class Broken:
        def clock_mhz(self, view):
            return view.clock

    with pytest.raises(OwnPolicyError, match=r"policy .*Broken: clock_mhz failed at 0\.000 s: AttributeError"):
        Driven(Broken())


def test_a_policy_cannot_end_the_process():
    class Leaves:
        def clock_mhz(self, view):
            sys.exit(0)

    with pytest.raises(OwnPolicyError, match=r"Leaves: clock_mhz failed at 0\.000 s: SystemExit\(0\)"):
        Driven(Leaves())


def test_percentiles_are_of_nearest_rank():
    assert percentile((), 0.5) is None
    assert percentile((3.0, 1.0, 2.0), 0.5) == 2.0
    assert [percentile(range(1, 101), share) for share in (0.0, 0.95, 1.0)] == [1, 95, 100]
