"""The recent requests replayed: against a replay iteration by iteration, and the paces that are found by it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.toy import CLOCKS_MHZ, SPEC, flat_table, request, spec, table
from throttllem.core.clocks.hindsight import Switching, _Rehearsal, known_well_enough, pace_in_hindsight, renewed
from throttllem.core.clocks.request_chain import chain
from throttllem.core.clocks.steady_load import LoadEstimator
from throttllem.core.external_load import ExternalLoad
from throttllem.core.types import Slo

TICKS = (16, 12, 9, 8, 7)
TICK_S = 1 / 1024
MAXIMUM = len(CLOCKS_MHZ) - 1
AT_ONCE = Switching(latency_s=0.0, dwell_s=0.0, fewest_steps=1)


def known(*requests, window_s=10.0):
    """A load estimator that knows these requests: (arrival in ticks, prompt, output, SLO, more of the request)."""
    load = LoadEstimator(window_s=window_s)
    for key, (ticks, prompt, output, slo, more) in enumerate(requests):
        one = request(key, prompt, output, slo=slo, arrival_s=ticks * TICK_S, **more)
        load.arrived(one, ticks * TICK_S, predicted_tokens=output, expected_tokens=output)
    for key, (_, _, output, _, _) in enumerate(requests):
        load.finished(key, output, output)
    return load


def rehearsal(load, table=None, spec=SPEC, switching=AT_ONCE, keep=1.0, external=None):
    return _Rehearsal(load, table or flat_table(TICKS), spec, external or ExternalLoad(), switching, keep)


def at(column, *arguments, **changes):
    """Energy and violations at one clock."""
    rehearsed = rehearsal(*arguments, **changes)
    rehearsed.allowed = rehearsed.allowed + 10**6
    joules, violated, _ = rehearsed.replayed(np.array([column]), math.inf)
    return joules, violated.tolist()


@pytest.mark.parametrize(("column", "ticks"), list(enumerate(TICKS)))
def test_a_request_alone_takes_an_iteration_for_each_token(column, ticks):
    took = ticks * 9
    for slo, late in (
        (Slo(e2e_s=took * TICK_S), 0),
        (Slo(e2e_s=(took - 1) * TICK_S), 1),
        (Slo(ttft_s=ticks * TICK_S), 0),
        (Slo(ttft_s=(ticks - 1) * TICK_S), 1),
        (Slo(tbt_s=ticks * TICK_S), 0),
        (Slo(tbt_s=(ticks - 1) * TICK_S), 1),
    ):
        joules, violated = at(column, known((100, 4, 9, slo, {})))
        assert joules == pytest.approx(took * TICK_S * (100 - SPEC.idle_w))
        assert violated == [late], slo
    assert at(column, known((100, 4, 9, Slo(e2e_s=took * TICK_S), {})), keep=0.9)[1] == [int(column < MAXIMUM)]


def test_requests_share_iterations_and_a_prompt_waits_for_the_one_that_runs():
    # The second comes in the first iteration of 7 ticks, joins the next, and both end after 9 of them.
    pair = known((0, 4, 9, Slo(), {}), (3, 4, 8, Slo(ttft_s=11 * TICK_S), {}))
    assert at(MAXIMUM, pair) == (pytest.approx(9 * 7 * TICK_S * 60), [0])
    assert at(MAXIMUM, known((0, 4, 9, Slo(), {}), (3, 4, 8, Slo(ttft_s=10 * TICK_S), {})))[1] == [1]


def test_what_does_not_fit_waits():
    first, second = (0, 4, 10, Slo(), {}), (1, 4, 10, Slo(ttft_s=12 * 7 * TICK_S), {})
    assert at(MAXIMUM, known(first, second)) == (pytest.approx(11 * 7 * TICK_S * 60), [0])
    alone = spec(max_batch=1)
    assert at(MAXIMUM, known(first, second), spec=alone) == (pytest.approx(20 * 7 * TICK_S * 60), [0])
    assert at(MAXIMUM, known(first, second), spec=spec(kv_blocks=3))[0] > 11 * 7 * TICK_S * 60
    full = ExternalLoad(batch=0, kv_blocks=SPEC.kv_blocks)
    assert at(MAXIMUM, known(first, second), external=full)[0] == pytest.approx(20 * 7 * TICK_S * 60)
    together = (1, 4, 10, Slo(), {"sequences": 2})
    assert at(MAXIMUM, known(first, together), spec=spec(max_batch=2))[0] == pytest.approx(20 * 7 * TICK_S * 60)


def test_a_higher_clock_is_in_force_after_the_switch_latency():
    """At 16 ticks for one request and 7 for two. The second comes in the first iteration."""
    pair = known((0, 4, 20, Slo(), {}), (1, 4, 20, Slo(), {}))
    by_requests = np.array([0, 0, MAXIMUM])
    for latency, slow in ((0.0, 1), (10 * TICK_S, 2), (40 * TICK_S, 4)):
        rehearsed = rehearsal(pair, switching=Switching(latency_s=latency, dwell_s=0.0, fewest_steps=1))
        joules = rehearsed.replayed(by_requests, math.inf)[0]
        assert joules == pytest.approx((slow * 16 + (20 - slow) * 7 + 16) * TICK_S * 60), "the last is alone again"


def test_a_lower_clock_waits_for_the_dwell_and_is_far_enough_below():
    # The first of two ends after ten iterations of 7 ticks; then one request is left with ten more.
    pair = known((0, 4, 10, Slo(), {}), (0, 4, 20, Slo(), {}))
    by_requests = np.array([3, 3, MAXIMUM])
    for dwell, steps, ticks in ((0.0, 1, 8), (0.0, 2, 7), (1.0, 1, 7)):
        switching = Switching(latency_s=0.0, dwell_s=dwell, fewest_steps=steps)
        joules = rehearsal(pair, switching=switching).replayed(by_requests, math.inf)[0]
        assert joules == pytest.approx((10 * 7 + 10 * ticks) * TICK_S * 60)


def iteration_by_iteration(load, table, engine, by_requests, idle_w, switching):
    """The same replay, without a step that stands for several iterations."""
    waiting = [
        (arrival_s, int(prompt), int(output), e2e_s, ttft_s, tbt_s)
        for arrival_s, prompt, _, _, output, _, e2e_s, ttft_s, tbt_s, _, _, _ in load.recent.values()
    ]
    running, now_s, joules, late = [], waiting[0][0], 0.0, 0
    column = target = by_requests[min(1, len(by_requests) - 1)]
    set_s, force_s = -math.inf, math.inf
    while waiting or running:
        here = [one for one in waiting if one[0] <= now_s]
        if not running and not here:
            now_s = waiting[0][0]
            continue
        wanted = by_requests[min(len(running) + len(here), len(by_requests) - 1)]
        if wanted > target or (target - wanted >= switching.fewest_steps and now_s >= set_s + switching.dwell_s):
            column, force_s = (column, now_s + switching.latency_s) if wanted > column else (wanted, math.inf)
            target, set_s = wanted, now_s
        if now_s >= force_s:
            column, force_s = target, math.inf
        joined, prompts = [], 0
        tokens = sum(one["prompt"] + one["done"] for one in running)
        for one in here:
            blocks = (tokens + prompts + one[1]) / engine.block_tokens + 0.5 * (len(running) + len(joined) + 1)
            many = len(running) + len(joined) + 1
            if (many > 1 and (many > engine.max_batch or blocks > engine.kv_blocks)) or (
                prompts and prompts + one[1] > engine.prefill_budget_tokens
            ):
                break
            prompts += one[1]
            joined.append({"due": one, "prompt": one[1], "done": 0, "left": one[2]})
        waiting = waiting[len(joined) :]
        running += joined
        kv_blocks = int((tokens + prompts) / engine.block_tokens + 0.5 * len(running))
        step_s, watts = table.at(table.clocks_mhz[column], len(running), kv_blocks, prompts)
        now_s += step_s
        joules += step_s * (watts - idle_w)
        for one in running:
            one["done"], one["left"] = one["done"] + 1, one["left"] - 1
            if one["done"] == 1:
                one["first_s"] = now_s
            if one["left"] == 0:
                arrival_s, _, output, e2e_s, ttft_s, tbt_s = one["due"]
                late += (
                    now_s - arrival_s > e2e_s
                    or one["first_s"] - arrival_s > ttft_s
                    or (now_s - one["first_s"]) / max(1, output - 1) > tbt_s
                )
        running = [one for one in running if one["left"]]
    return joules, late


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=14),
    st.lists(st.integers(0, MAXIMUM), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.02, 0.2]),
)
def test_equals_a_replay_iteration_by_iteration(drawn, by_requests, pause_s):
    """In a table whose seconds do not depend on KV blocks: there one step stands for several iterations exactly."""
    arrival, requests = 0, []
    for gap, prompt, output in drawn:
        arrival += gap
        requests.append((arrival, prompt, output, Slo(e2e_s=1.0, ttft_s=0.1, tbt_s=0.02), {}))
    load, by_batch = known(*requests), table(SPEC, kv_step=1000)
    switching = Switching(latency_s=pause_s, dwell_s=pause_s, fewest_steps=2)
    rehearsed = rehearsal(load, by_batch, switching=switching)
    rehearsed.allowed = rehearsed.allowed + 10**6
    joules, violated, most = rehearsed.replayed(np.array(by_requests), math.inf)
    plain = iteration_by_iteration(load, by_batch, SPEC, by_requests, SPEC.idle_w, switching)
    assert (joules, violated.tolist()) == (pytest.approx(plain[0], rel=1e-5), [plain[1]])
    assert 1 <= most <= len(requests)


# ---- the pace --------------------------------------------------------------------------------------------------------

WHOLE = table(SPEC)


def stream(slo, count=200, gap=1000, output=16, **more):
    return known(*((n * gap, 4, output, slo, more) for n in range(count)))


def found(load, keep=1.0, now_s=None, **changes):
    now_s = load.last_s if now_s is None else now_s
    present = load.load(now_s + 1e-6)
    whole = {"external": ExternalLoad(), "switching": AT_ONCE} | changes
    return pace_in_hindsight(load, present, chain(present, WHOLE, SPEC), WHOLE, SPEC, keep=keep, **whole)


def alone_s(column, output=16):
    """Seconds of one request alone, in the toy's table."""
    mhz = CLOCKS_MHZ[column]
    first = WHOLE.at(mhz, 1, 1, 4)[0]
    return first + sum(WHOLE.at(mhz, 1, -(-(4 + n) // 4), 0)[0] for n in range(1, output))


def test_the_pace_is_as_slow_as_the_slos_allow():
    free = found(stream(Slo()))
    columns = [int(free.by_requests[1])]
    for column in (1, 2, 3):
        columns.append(int(found(stream(Slo(e2e_s=alone_s(column) * 1.02))).by_requests[1]))
    assert columns == [0, 1, 2, 3]
    assert int(found(stream(Slo(e2e_s=alone_s(1) * 1.02)), keep=0.9).by_requests[1]) > 1


def test_a_part_of_the_requests_may_violate_their_slo_and_those_that_no_clock_serves_in_time_do_not_count():
    loose, tight = Slo(e2e_s=9.0, attainment=0.9), Slo(e2e_s=alone_s(2) * 1.02, attainment=0.9)
    hopeless = Slo(e2e_s=alone_s(MAXIMUM) / 2, attainment=0.9)

    def mixed(share, slo):
        return known(*((n * 1000, 4, 16, slo if n % share == 0 else loose, {}) for n in range(200)))

    assert int(found(mixed(20, tight)).by_requests[1]) == 0, "a twentieth may be late"
    assert int(found(mixed(5, tight)).by_requests[1]) == 2, "a fifth may not"
    lost = found(mixed(5, hopeless))
    assert int(lost.by_requests[1]) == 0 and lost.late_at_maximum == {"": 40}
    assert found(mixed(5, hopeless), ended_before=190).late_at_maximum == {"": 2}, "of the last ten"
    runs = mixed(5, hopeless)
    newest = request(200, 4, 16, slo=hopeless, arrival_s=200_000 * TICK_S)
    runs.arrived(newest, 200_000 * TICK_S, predicted_tokens=16, expected_tokens=16)
    assert found(runs, ended_before=190).late_at_maximum == {"": 2}, "nothing is owed yet for one that runs"
    runs.finished(200, 16, 16)
    assert found(runs, ended_before=200).late_at_maximum == {"": 1}


def test_every_class_has_its_own_share():
    loose, tight = Slo(e2e_s=9.0, attainment=0.9), Slo(e2e_s=alone_s(2) * 1.02, attainment=0.9)
    classes = (("chat", loose),) * 19 + (("voice", tight),)
    load = known(*((n * 1000, 4, 16, classes[n % 20][1], {"slo_class": classes[n % 20][0]}) for n in range(200)))
    pace = found(load)
    assert int(pace.by_requests[1]) == 2 and pace.late_at_maximum == {"chat": 0, "voice": 0}


def test_more_requests_than_were_seen_mean_the_maximum_clock():
    pace = found(stream(Slo(e2e_s=alone_s(0) * 1.02)))
    assert pace.by_requests[-1] == MAXIMUM
    assert len(pace.by_requests) == 3, "none, one, and more than ever there were"


def test_a_pace_that_the_maximum_clock_alone_can_keep_is_the_maximum_clock():
    pace = found(stream(Slo(e2e_s=alone_s(MAXIMUM) * 1.001)))
    assert set(pace.by_requests[1:].tolist()) == {MAXIMUM}


def test_it_rests_on_outputs_that_ended_and_is_sought_again_when_enough_requests_are_new():
    load = stream(Slo(), count=7)
    assert not known_well_enough(load)
    load.finished(6, 16, 16)
    assert known_well_enough(load)
    assert not renewed(load, 4, 1.0) and renewed(load, 3, 1.0)
    long = stream(Slo(), count=160)
    assert not renewed(long, 151, 1.0) and renewed(long, 150, 1.0)
    many = stream(Slo(), count=512)
    assert not renewed(many, 0, 9.9) and renewed(many, 0, 10.0) and not renewed(many, 481, 10.0)
