"""Late first tokens of the recent requests at each clock: against the recursion by hand, and what closes clocks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.toy import SPEC, flat_table, spec, table
from throttllem.core.clocks.first_tokens import late_first_tokens

TICK_S = 1 / 1024
TICKS = (16, 12, 9, 8, 7)


def request(arrival_ticks, ttft_ticks, prompt=8):
    """As the load estimator holds it."""
    return 10, math.inf, prompt, ttft_ticks * TICK_S, arrival_ticks * TICK_S, 0.99


def late(recent, table=None, spec=SPEC, keep=1.0, switch_ticks=10**6):
    found = late_first_tokens(
        recent,
        table or flat_table(TICKS),
        spec,
        batch=2,
        kv_blocks=8,
        keep=keep,
        switch_latency_s=switch_ticks * TICK_S,
    )
    return (found * len(recent)).round().astype(int).tolist()


def test_one_request_waits_for_an_iteration_and_then_for_its_own():
    # 32, 24, 18, 16, 14 ticks.
    assert late([request(100, 20)]) == [1, 1, 0, 0, 0]
    assert late([request(100, 20)], keep=0.85) == [1, 1, 1, 0, 0]
    assert late([request(100, math.inf)]) == [0] * 5


def test_prompts_wait_for_those_before_them():
    # At 16 ticks the second is free at 32 + 16 ticks, 38 after its arrival; at 7 at 14 + 7, 11 after it.
    pair = [request(100, 40), request(110, 20)]
    assert late(pair) == [1, 1, 0, 0, 0]
    assert late([request(100, 40), request(130, 20)]) == [1, 1, 0, 0, 0]
    assert late([request(0, 40), request(20, 31)]) == [1, 0, 0, 0, 0]


def test_a_prompt_that_begins_after_a_switch_runs_at_the_maximum_clock():
    # It begins after an iteration of 16 ticks, and takes 16, or 7 if the maximum clock is in force by then.
    assert late([request(100, 25)], switch_ticks=17)[0] == 1
    assert late([request(100, 25)], switch_ticks=16)[0] == 0


def test_a_long_prompt_takes_several_iterations():
    engine = spec(chunked=True, prefill_budget_tokens=10)  # two of ten tokens are those of decoding sequences
    assert late([request(100, 40, prompt=16)], spec=engine) == [1, 0, 0, 0, 0]
    assert late([request(100, 40, prompt=17)], spec=engine) == [1, 1, 0, 0, 0]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 80)), min_size=1, max_size=12),
    st.integers(0, 40),
)
def test_equals_the_recursion_request_by_request(drawn, switch_ticks):
    whole, arrival, recent = table(SPEC), 0.0, []
    for gap, prompt, ttft in drawn:
        arrival += gap
        recent.append(request(arrival, ttft * 10, prompt))
    found = late(recent, whole, switch_ticks=switch_ticks)
    for column, mhz in enumerate(SPEC.clocks_mhz):
        step_s, free_s, count = whole.at(mhz, 2, 8, 0)[0], -math.inf, 0
        for _, _, prompt, ttft_s, arrival_s, _ in recent:
            begins_s, due_s = max(free_s, arrival_s + step_s), arrival_s + ttft_s
            took_s, fastest_s = (
                sum(whole.at(clock, 2, 8, tokens)[0] for tokens in chunks(prompt, whole)) for clock in (mhz, 1400)
            )
            sprints = begins_s + took_s > due_s and begins_s >= arrival_s + switch_ticks * TICK_S
            free_s = begins_s + (fastest_s if sprints else took_s)
            count += free_s > due_s
        assert found[column] == pytest.approx(count, abs=1e-9)


def chunks(prompt, table):
    largest = table.prefill_bin.size - 1
    return [largest] * (prompt // largest) + ([prompt % largest] if prompt % largest else [])


def test_no_clock_is_worse_than_a_lower_one_for_a_table_that_is_faster_at_higher_clocks():
    rng = np.random.default_rng(0)
    arrivals, prompts = np.cumsum(rng.exponential(30, 99)), rng.integers(1, 40, 99)
    recent = [request(at, 60, int(prompt)) for at, prompt in zip(arrivals, prompts, strict=True)]
    found = late(recent, table(SPEC))
    assert found == sorted(found, reverse=True) and found[0] > found[-1]
