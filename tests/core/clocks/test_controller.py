"""The clock controller: every reason of a plan, dwell and latency of switches, GPUs that do not follow."""

import math

import pytest

from core.stories import SIZES, arrive, options, world
from core.toy import CLOCKS_MHZ, SPEC, TOP_MHZ, flat_table, request, sequence, spec, table
from throttllem.core.clocks.controller import ClockController
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.clocks.steady_load import LoadEstimator
from throttllem.core.engine_state import EngineState
from throttllem.core.forecast.margins import Margins
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import ClockRead, FrequencyPlan, Reason, SetClock, Slo

TICKS = flat_table([16, 12, 9, 8, 7])
"""One number of 1/1024 s for each clock, whatever runs."""
STEEP = flat_table([16, 12, 9, 8, 7], watts=(100, 130, 180, 230, 300))
"""The same, with less energy at each lower clock."""


def controller(policy=ClockPolicy.THROTTLLEM, **changes):
    plain = {"switch_latency_s": 0.0, "dwell_s": 0.0, "min_saving": 0.0, "margin": 0.0, "reserve": 0.0}
    return ClockController(ThrottleOptions(policy=policy, **plain | changes), LoadEstimator(window_s=60.0), Margins())


def engine(*pending, spec=SPEC, table=TICKS, clock_mhz=TOP_MHZ, target_mhz=TOP_MHZ, **changes):
    """An engine in its iteration 0 from second 0 on, with these requests pending."""
    board = Scoreboard(SPEC.block_tokens)
    for one in pending:
        board.dispatch(one)
    return EngineState(
        engine=3, tp=1, spec=spec, table=table, board=board, clock_mhz=clock_mhz, target_mhz=target_mhz, **changes
    )


def came(load, now_s, prompt, output, slo):
    """One request that came and ended, with its output as predicted."""
    one = request(load.seen, prompt, output, slo=slo, arrival_s=now_s)
    load.arrived(one, now_s, predicted_tokens=output, expected_tokens=output)
    load.finished(one.id, output, output)


def within(ticks, key=1, arrival_s=0.0):
    """32 tokens within `ticks` times 32/1024 s."""
    return sequence(key, 4, 32, arrival_s=arrival_s, slo=Slo(e2e_s=ticks * 32 / 1024))


def planned(clocks, engine, now_s=0.0, waiting=False):
    """The plan, after checking that a command is given exactly if the target changes."""
    before = engine.target_mhz
    command = clocks.plan(engine, now_s, waiting=waiting)
    assert engine.target_mhz == engine.plan.mhz
    if engine.plan.mhz == before:
        assert command is None
    else:
        assert command == SetClock(engine=3, plan=engine.plan) and engine.set_at_s == now_s
    return engine.plan


def plan(mhz, why, binding=None):
    return FrequencyPlan(mhz=mhz, why=why, binding=binding)


def test_while_a_request_runs_without_control_no_lower_clock_is_safe():
    busy = engine(within(7.5), clock_mhz=800, target_mhz=800, uncontrolled=1)
    assert planned(controller(), busy) == plan(TOP_MHZ, Reason.UNCONTROLLED)
    idle = engine(clock_mhz=800, target_mhz=800, uncontrolled=1)
    assert planned(controller(), idle) == plan(TOP_MHZ, Reason.UNCONTROLLED)
    idle.uncontrolled = 0
    assert planned(controller(), idle).why is Reason.IDLE


@pytest.mark.parametrize("unknown", [False, True])
def test_policies_that_fix_the_clock(unknown):
    busy = engine(within(7.5), clock_mhz=None if unknown else 800, target_mhz=None if unknown else 800)
    assert planned(controller(ClockPolicy.TOP), busy) == plan(TOP_MHZ, Reason.FIXED)
    assert planned(controller(ClockPolicy.FIXED, fixed_mhz=1000), busy) == plan(1000, Reason.FIXED)
    assert busy.projection is None


@pytest.mark.parametrize("policy", [ClockPolicy.THROTTLLEM, ClockPolicy.LEAST_ENERGY])
def test_what_is_not_known_means_the_maximum_clock(policy):
    relaxed = sequence(1, 4, 32)
    low = {"clock_mhz": 600, "target_mhz": 600}
    clocks = controller(policy)
    assert planned(clocks, engine(relaxed, clock_mhz=None, target_mhz=None)) == plan(TOP_MHZ, Reason.UNKNOWN_STATE)
    assert planned(clocks, engine(clock_mhz=None, target_mhz=None)) == plan(TOP_MHZ, Reason.UNKNOWN_STATE)
    assert planned(clocks, engine(relaxed, table=None, **low)) == plan(TOP_MHZ, Reason.NO_TABLE)
    assert planned(clocks, engine(relaxed, table=table(SPEC, max_kv_blocks=8), **low)) == plan(
        TOP_MHZ, Reason.OUTSIDE_HULL
    )
    assert planned(clocks, engine(relaxed, table=table(SPEC, max_kv_blocks=9), **low)).why is not Reason.OUTSIDE_HULL


def test_an_unmeetable_request_is_lost_and_the_paper_runs_it_at_the_maximum_clock():
    late = engine(within(6.9), sequence(2, 4, 32), clock_mhz=600, target_mhz=600)
    assert planned(controller(), late) == plan(TOP_MHZ, Reason.LOST_RUNNING)
    assert (late.board.lost_requests, late.board.pending[1].lost, late.board.pending[2].lost) == (1, True, False)
    late.board.remove(1)
    assert planned(controller(), late).why is not Reason.LOST_RUNNING


def test_least_energy_runs_a_lost_request_at_the_clock_that_suits_a_known_load():
    late = engine(within(6.9), within(9, key=2), table=STEEP, clock_mhz=600, target_mhz=600)
    assert planned(controller(ClockPolicy.LEAST_ENERGY), late) == plan(TOP_MHZ, Reason.LOST_RUNNING)
    late = engine(within(6.9, 1, 50.0), within(9, 2, 50.0), table=STEEP, clock_mhz=600, target_mhz=600)
    assert planned(loaded(rate=0.5, together=2), late, 50.0) == plan(1000, Reason.LOWEST_FEASIBLE, 2)
    assert (late.board.lost_requests, late.board.pending[1].lost, late.board.pending[2].lost) == (1, True, False)


def test_a_waiting_request_means_the_maximum_clock():
    assert planned(controller(), engine(sequence(1, 4, 32)), waiting=True) == plan(TOP_MHZ, Reason.WAITING)


def test_idle_keeps_the_clock():
    idle = engine(clock_mhz=800, target_mhz=800)
    assert planned(controller(), idle) == plan(800, Reason.IDLE)
    assert idle.replan_s == math.inf


@pytest.mark.parametrize(
    ("ticks", "mhz", "why"),
    [
        (16, 600, Reason.LOWEST_CLOCK),
        (15.9, 800, Reason.LOWEST_FEASIBLE),
        (9, 1000, Reason.LOWEST_FEASIBLE),
        (8.5, 1200, Reason.LOWEST_FEASIBLE),
        (7, 1400, Reason.LOWEST_FEASIBLE),
    ],
)
def test_the_paper_takes_the_lowest_feasible(ticks, mhz, why):
    chosen = planned(controller(), engine(within(ticks)))
    assert chosen == plan(mhz, why, 1 if why is Reason.LOWEST_FEASIBLE else None)


def test_margin_and_reserve_are_taken_from_deadlines():
    assert planned(controller(margin=0.25), engine(within(12))).mhz == 1000
    assert planned(controller(reserve=0.25), engine(within(12))).mhz == 1000
    # The SLO can be met (7 of 8), but not with a quarter reserved.
    assert planned(controller(margin=0.25), engine(within(8), clock_mhz=600, target_mhz=600)) == plan(
        TOP_MHZ, Reason.INFEASIBLE, 1
    )


def test_a_switch_up_takes_its_latency_out_of_the_deadline():
    # 32 iterations at 1000 MHz: 9/32 s of 10/32; reaching it from 800 MHz takes 1.5/32 s, 1200 MHz would do.
    slow = {"clock_mhz": 800, "target_mhz": 800}
    assert planned(controller(), engine(within(10), **slow)).mhz == 1000
    assert planned(controller(switch_latency_s=1.5 / 32), engine(within(10), **slow)).mhz == 1200
    # A clock that is on its way costs what is left of its latency, the one in force nothing.
    coming = engine(within(10), clock_mhz=800, target_mhz=1000, set_at_s=-1 / 32)
    assert planned(controller(switch_latency_s=1.5 / 32), coming).mhz == 1000
    there = engine(within(10), clock_mhz=1000, target_mhz=1000)
    assert planned(controller(switch_latency_s=1.5 / 32), there).mhz == 1000
    # With 4/32 s no higher clock arrives in time: even the maximum is too late, so the request is lost.
    assert planned(controller(switch_latency_s=4 / 32), engine(within(10), **slow)).why is Reason.LOST_RUNNING


@pytest.mark.parametrize(
    ("clock", "target", "set_at_s", "delay_s"),
    [
        (1400, 1400, -9.0, 0.0),
        (800, 800, -9.0, 0.2),
        (800, 1400, 0.9, 0.1),
        (800, 1400, -9.0, 0.0),
        (1400, 800, 0.9, 0.0),
    ],
)
def test_the_delay_to_the_maximum_clock(clock, target, set_at_s, delay_s):
    state = engine(clock_mhz=clock, target_mhz=target, set_at_s=set_at_s)
    assert state.maximum_clock_delay_s(1.0, 0.2) == pytest.approx(delay_s)


def test_down_only_after_the_dwell_and_up_at_once():
    clocks = controller(dwell_s=0.5)
    busy = engine(within(16))
    assert planned(clocks, busy, 0.0) == plan(600, Reason.LOWEST_CLOCK)
    busy.clock_mhz = 600
    busy.board.dispatch(within(9, key=2))
    assert planned(clocks, busy, 0.01).mhz > 600
    first = busy.plan.mhz
    busy.clock_mhz = first
    busy.board.remove(2)
    assert planned(clocks, busy, 0.02) == plan(first, Reason.DWELL, 1)
    assert busy.replan_s == pytest.approx(0.01 + 0.5)
    # By then the deadline is out of reach at the lowest clock; another request takes its place.
    busy.board.remove(1)
    busy.board.dispatch(sequence(3, 4, 32))
    assert planned(clocks, busy, 0.509) == plan(first, Reason.DWELL)
    assert planned(clocks, busy, 0.51) == plan(600, Reason.LOWEST_CLOCK)


def test_least_energy_takes_the_least_watts_or_joules():
    # The toy's law has its least energy per iteration inside the range, so neither end is taken.
    whole = table(SPEC)
    chosen = planned(controller(ClockPolicy.LEAST_ENERGY), engine(sequence(1, 4, 32), table=whole))
    each_j = [(step_w - SPEC.idle_w) * step_s for step_s, step_w in (whole.at(mhz, 1, 5, 0) for mhz in CLOCKS_MHZ)]
    assert chosen == plan(CLOCKS_MHZ[each_j.index(min(each_j))], Reason.LEAST_ENERGY)


def test_least_energy_names_the_slo_that_rules_out_a_lower_clock():
    # Constant watts over steps of 16 to 7 ticks: the top clock is the cheapest, so a steep table is made of the law.
    whole = table(SPEC)
    step_s = [whole.at(mhz, 1, 5, 0)[0] for mhz in CLOCKS_MHZ]
    free = planned(controller(ClockPolicy.LEAST_ENERGY), engine(sequence(1, 4, 32), table=whole)).mhz
    index = CLOCKS_MHZ.index(free)
    tight = sequence(1, 4, 32, slo=Slo(tbt_s=(step_s[index] + step_s[index + 1]) / 2))
    assert planned(controller(ClockPolicy.LEAST_ENERGY), engine(tight, table=whole)) == plan(
        CLOCKS_MHZ[index + 1], Reason.LOWEST_FEASIBLE
    )


def test_least_energy_switches_down_only_for_a_large_enough_saving():
    whole = table(SPEC)
    best = planned(controller(ClockPolicy.LEAST_ENERGY), engine(sequence(1, 4, 32), table=whole)).mhz
    assert best < TOP_MHZ
    dear = planned(controller(ClockPolicy.LEAST_ENERGY, min_saving=0.9), engine(sequence(1, 4, 32), table=whole))
    assert dear == plan(TOP_MHZ, Reason.NOT_WORTH)
    # Upwards it only has to be cheaper.
    lower = engine(sequence(1, 4, 32), table=whole, clock_mhz=CLOCKS_MHZ[0], target_mhz=CLOCKS_MHZ[0])
    if best > CLOCKS_MHZ[0]:
        assert planned(controller(ClockPolicy.LEAST_ENERGY, min_saving=0.9), lower).mhz == best


def test_the_pace_is_renewed_with_the_requests_and_with_time():
    load = LoadEstimator(window_s=10.0)
    for n in range(200):
        came(load, n / 4, 16, 16, Slo())
    clocks = ClockController(ThrottleOptions(policy=ClockPolicy.LEAST_ENERGY), load, Margins())
    busy = engine(sequence(1, 4, 32), table=table(SPEC))
    planned(clocks, busy, 50.0)
    first = busy.hindsight
    assert first is not None
    for _ in range(12):
        came(load, 50.2, 16, 16, Slo())
    planned(clocks, busy, 51.5)
    assert busy.hindsight is first
    came(load, 51.5, 16, 16, Slo())
    planned(clocks, busy, 51.6)
    second = busy.hindsight
    assert second is not first
    planned(clocks, busy, 81.6)
    assert busy.hindsight is second
    planned(clocks, busy, 81.7)
    assert busy.hindsight is not second


def test_until_outputs_have_ended_the_requests_at_hand_alone_choose_the_clock():
    load = LoadEstimator(window_s=10.0)
    for n in range(40):
        load.arrived(request(n, 16, 16), n / 4, predicted_tokens=16, expected_tokens=16)
    clocks = ClockController(ThrottleOptions(policy=ClockPolicy.LEAST_ENERGY), load, Margins())
    busy = engine(sequence(1, 4, 32), table=table(SPEC))
    planned(clocks, busy, 10.0)
    assert busy.hindsight is None
    for n in range(8):
        load.finished(n, 16, 16)
    planned(clocks, busy, 11.0)
    assert busy.hindsight is not None


def loaded(rate=4.0, together=1, **changes):
    """A controller of least energy that knows a load, and may switch at once. So many requests came at a time."""
    load = LoadEstimator(window_s=10.0)
    for n in range(int(50 * rate)):
        came(load, n // together * together / rate, 16, 16, Slo())
    plain = {"switch_latency_s": 0.0, "dwell_s": 0.0, "margin": 0.0, "reserve": 0.0}
    return ClockController(ThrottleOptions(policy=ClockPolicy.LEAST_ENERGY, **plain | changes), load, Margins())


def test_waiting_requests_count_as_requests_and_do_not_force_the_maximum_clock():
    busy = engine(sequence(1, 4, 32), table=table(SPEC), clock_mhz=600, target_mhz=600)
    for waiting in range(9):
        chosen = planned(loaded(rate=16.0), busy, 50.0, waiting=waiting)
        assert chosen == plan(
            CLOCKS_MHZ[busy.hindsight.by_requests[min(1 + waiting, busy.hindsight.by_requests.size - 1)]],
            Reason.LEAST_ENERGY,
        )
        busy.target_mhz = 600
    assert busy.hindsight.by_requests[-1] > busy.hindsight.by_requests[1]


@pytest.mark.parametrize(
    ("apart_mhz", "above", "why"),
    [
        (20, 1, Reason.NOT_WORTH),
        (20, 2, Reason.LEAST_ENERGY),
        (200, 1, Reason.LEAST_ENERGY),
        (800, 1, Reason.LEAST_ENERGY),
    ],
)
def test_one_clock_lower_is_worth_a_switch_only_where_few_were_profiled(apart_mhz, above, why):
    clocks = tuple(range(CLOCKS_MHZ[0], TOP_MHZ + 1, apart_mhz))
    fine = spec(clocks_mhz=clocks)
    at = {"clock_mhz": clocks[above], "target_mhz": clocks[above]}
    busy = engine(sequence(1, 4, 32), spec=fine, table=table(fine), **at)
    assert planned(loaded(), busy, 50.0) == plan(clocks[above if why is Reason.NOT_WORTH else 0], why)


def test_while_requests_run_the_clock_is_planned_again_in_time():
    busy = engine(within(16))
    planned(controller(replan_s=0.75), busy, 2.0 / 1024)
    assert busy.replan_s == pytest.approx(0.75 + 2.0 / 1024)


def test_time_is_left_for_the_first_token_of_the_next_request():
    """Three prompts' iterations of 7 to 16 ticks must fit the SLO."""
    for ticks, mhz in ((60, CLOCKS_MHZ[0]), (30, CLOCKS_MHZ[2]), (20, TOP_MHZ)):
        clocks = controller()
        for _ in range(2):
            came(clocks._load, 0.0, 4, 32, Slo(ttft_s=ticks / 1024))
        assert planned(clocks, engine(sequence(1, 4, 32))).mhz == mhz


def test_least_energy_leaves_time_for_a_prompt_a_switch_and_the_first_token_at_the_maximum_clock():
    """Ticks at each clock: 16, 12, 9, 8, 7; then 3 for the switch, and 7."""
    for ticks, mhz in ((26, CLOCKS_MHZ[0]), (22, CLOCKS_MHZ[1]), (18, CLOCKS_MHZ[3]), (14, TOP_MHZ)):
        clocks = controller(ClockPolicy.LEAST_ENERGY, switch_latency_s=3 / 1024)
        for _ in range(2):
            came(clocks._load, 0.0, 4, 32, Slo(ttft_s=ticks / 1024))
        busy = engine(sequence(1, 4, 32), table=STEEP)
        assert planned(clocks, busy).mhz == mhz


def test_a_first_token_that_no_clock_gives_in_time_binds_no_clock():
    clocks = controller()
    for _ in range(2):
        came(clocks._load, 0.0, 4, 32, Slo(ttft_s=6 / 1024))  # the top clock takes 7 ticks for the prompt alone
    assert planned(clocks, engine(sequence(1, 4, 32))).mhz == CLOCKS_MHZ[0]


def test_least_energy_uses_its_reserve_before_the_maximum_clock_and_the_paper_does_not():
    # 32 iterations within 7.5 ticks each hold at the top clock only; with a tenth reserved they hold nowhere.
    for policy, why in ((ClockPolicy.LEAST_ENERGY, Reason.LEAST_ENERGY), (ClockPolicy.THROTTLLEM, Reason.INFEASIBLE)):
        found = planned(controller(policy, reserve=0.1), engine(within(7.5)))
        assert found.mhz == TOP_MHZ
        assert (found.why is Reason.INFEASIBLE) == (why is Reason.INFEASIBLE)


# ---- GPUs that do not follow -------------------------------------------------------------------------------


def read(live, mhz, limit_mhz=None):
    return [c for c in live.send(ClockRead(engine=0, mhz=mhz, limit_mhz=limit_mhz)) if isinstance(c, SetClock)]


def current(live):
    return live.controller.snapshot().engines[0].plan


def let_switches_end(live):
    live.now_s += 1.0  # no switch is under way


def test_a_clock_that_is_held_down_is_not_set_again_and_again():
    live = world(options(ClockPolicy.TOP, aware=False))
    arrive(live, 1)
    let_switches_end(live)
    assert read(live, 800, limit_mhz=800) == []
    assert read(live, 810, limit_mhz=810) == []


def test_a_clock_set_by_another_program_is_set_again():
    live = world(options(ClockPolicy.TOP, aware=False))
    arrive(live, 1)
    let_switches_end(live)
    assert [command.plan.mhz for command in read(live, 800)] == [TOP_MHZ]


def test_a_request_that_no_clock_saves_under_a_limit_is_lost():
    live = world(options(ClockPolicy.THROTTLLEM))
    arrive(live, 1, 4, 40, slo=Slo(e2e_s=0.85))
    assert (current(live).mhz, current(live).why) == (1000, Reason.LOWEST_FEASIBLE)
    read(live, 800, limit_mhz=800)
    assert (current(live).mhz, current(live).why) == (TOP_MHZ, Reason.LOST_RUNNING)


@pytest.mark.parametrize(("limit_mhz", "lost"), [(None, 0), (600, 1)])
def test_admission_knows_that_the_maximum_clock_is_out_of_reach(limit_mhz, lost):
    live = world(options(ClockPolicy.THROTTLLEM))
    let_switches_end(live)
    read(live, limit_mhz or TOP_MHZ, limit_mhz)
    arrive(live, 1, 4, 40, slo=Slo(e2e_s=0.75))
    assert live.controller.snapshot().engines[0].lost_requests == lost


def test_without_the_limit_the_whole_table_is_used_again():
    live = world(options(ClockPolicy.LEAST_ENERGY))
    arrive(live, 1, 4, 40, slo=Slo(e2e_s=2.0))
    let_switches_end(live)
    read(live, 800, limit_mhz=800)
    table = live.controller._engines.by_id[0].table
    assert table.limit_mhz == 800
    read(live, 800)
    assert live.controller._engines.by_id[0].table is table.base is live.controller.options.tables[1]


def test_a_limit_of_an_engine_without_a_table_changes_nothing():
    live = world(options(ClockPolicy.TOP, aware=False, tables={}))
    arrive(live, 1)
    let_switches_end(live)
    assert read(live, 800, limit_mhz=800) == []


@pytest.mark.parametrize("policy", list(ClockPolicy))
def test_whatever_the_limit_every_request_ends(policy):
    live = world(options(policy))
    for key in range(1, 7):
        arrive(live, key, 4, 20, slo=Slo(e2e_s=1.0))
    for limit_mhz in (1000, 600, None, 700):
        let_switches_end(live)
        read(live, limit_mhz or TOP_MHZ, limit_mhz)
    live.run_out(SIZES.get)
    assert live.controller.snapshot().counts.finished == 6


def test_a_measured_switch_latency_counts_in_place_of_the_configured_one():
    """32 iterations within 10/32 s: 9/32 at 1000 MHz; with the configured 1.5/32 s of a switch 1200 MHz would do."""
    slow = {"clock_mhz": 800, "target_mhz": 800}
    clocks = controller(switch_latency_s=1.5 / 32)
    for switches, mhz in ((19, 1200), (20, 1000)):
        measured = engine(within(10), **slow)
        for _ in range(switches):
            measured.switch_latency.took(SPEC.clocks_mhz, 1000, 0.5 / 32)
        assert planned(clocks, measured).mhz == mhz
    slower = engine(within(10), **slow)
    slower.switch_latency.took(SPEC.clocks_mhz, 1000, 1.5 / 32)
    assert planned(controller(switch_latency_s=0.5 / 32), slower).mhz == 1200
