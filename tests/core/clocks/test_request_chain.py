"""A clock for each number of requests: against every assignment of clocks there is, and what SLOs open and close."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.toy import SPEC, spec, table
from throttllem.core.clocks.request_chain import (
    Chain,
    by_clock,
    chain,
    least_energy_pace,
    least_mean_watts,
    open_clocks,
)
from throttllem.core.clocks.steady_load import Load

TABLE = table(SPEC)
MAXIMUM = len(SPEC.clocks_mhz) - 1


def mean_w(rate, leave_per_s, watts, idle_w, column, price_w):
    """Mean watts of one assignment, by the balance of the chain: rate * p(n - 1) = leave(n) * p(n)."""
    likely, total = [1.0], [idle_w]
    for n, c in enumerate(column):
        last = n == len(column) - 1
        ratio = rate / leave_per_s[n][c]
        likely.append(likely[-1] * ratio / (1 - ratio if last else 1))  # and all beyond, a geometric tail
        total.append(watts[n][c] + price_w * (n + 1 + (ratio / (1 - ratio) if last else 0)))
    return sum(p * w for p, w in zip(likely, total, strict=True)) / sum(likely)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 5.0), st.sampled_from([0.0, 1.0, 30.0]))
def test_no_assignment_of_clocks_has_less_mean_power(seed, rate, price_w):
    rng = np.random.default_rng(seed)
    leave = np.sort(rng.uniform(0.5, 6.0, (4, 3)), axis=1)
    watts = np.sort(rng.uniform(100.0, 400.0, (4, 3)), axis=1)
    is_open = rng.random((4, 3)) < 0.7
    is_open[:, -1] = True
    leave[-1, -1] += 4.0
    zeros = np.zeros_like(leave)
    states = Chain(kv_blocks=1.0, leave_per_s=leave, watts=watts, prompt_s=zeros, step_s=zeros)
    found = least_mean_watts(rate, *by_clock(states, is_open), zeros, 60.0, price_w)[0]
    assert all(is_open[n, c] for n, c in enumerate(found))
    open_to = [[c for c in range(3) if is_open[n, c] and (n < 3 or leave[n, c] > rate)] for n in range(4)]
    choices = itertools.product(*open_to)
    least = min(mean_w(rate, leave, watts, 60.0, column, price_w) for column in choices)
    assert mean_w(rate, leave, watts, 60.0, found, price_w) == pytest.approx(least, rel=1e-9)


def load(rate, **changes):
    plain = {"prompt_tokens": 8.0, "output_tokens": 16.0, "long_output_tokens": 16.0, "burst": 1.0, "e2e_s": None}
    return Load(requests_per_s=rate, **plain | changes)


def pace(load, spec=SPEC, tbt_s=math.inf, reserve=0.0):
    states = chain(load, TABLE, spec)
    return least_energy_pace(load, states, open_clocks(load, states, tbt_s), spec, reserve=reserve)


def test_no_more_requests_than_fit():
    # A mean request holds (8 + 8) / 4 + 0.5 = 4.5 blocks, and 0.9 of 64 blocks hold 12 of them, but the batch has 8.
    assert pace(load(1.0)).column.size == SPEC.max_batch
    assert pace(load(1.0), spec(kv_blocks=30)).column.size == 6
    assert chain(load(1.0), TABLE, spec(kv_blocks=9)) is None


def test_a_rate_that_has_faded_to_nothing_has_no_chain():
    """One request that runs for half a day: a load estimator's weights are 0 by then."""
    assert chain(load(0.0), TABLE, SPEC) is None
    assert pace(load(1e-300)).mean_requests < 1e-299


def test_a_request_leaves_after_its_prompt_and_its_share_of_iterations():
    states = chain(load(1.0), TABLE, SPEC)
    for n, mhz in ((1, 600), (4, 1000), (8, 1400)):
        column = SPEC.clocks_mhz.index(mhz)
        decode_s, decode_w = TABLE.at(mhz, n, int(4.5 * n), 0)
        mixed_s, mixed_w = TABLE.at(mhz, n, int(4.5 * n), 8)
        # 16 tokens to each of n requests: 16 / n iterations for one of them, one of which holds a prompt.
        each_s = mixed_s + (16 / n - 1) * decode_s
        assert states.leave_per_s[n - 1, column] == pytest.approx(1 / each_s)
        each_j = mixed_s * mixed_w + (16 / n - 1) * decode_s * decode_w
        assert states.watts[n - 1, column] == pytest.approx(each_j / each_s)


def test_where_running_costs_more_than_idling_a_request_races_to_idle():
    active_w = TABLE.watts[TABLE.cell(1, 5, 0)]
    # Nothing is gained by an early end where idling costs as much as the lowest clock, everything where it is free.
    leave = chain(load(0.05), TABLE, SPEC).leave_per_s[0]
    for idle_w in (1.0, 60.0, float(active_w[0]) - 1.0):
        each_j = (active_w - idle_w) / leave
        assert pace(load(1e-4), spec(idle_w=idle_w)).column[0] == each_j.argmin()


@given(st.floats(0.5, 30.0), st.floats(0.4, 4.0))
def test_a_long_output_comes_in_time_by_littles_law_or_nearly_as_fast_as_at_the_maximum_clock(rate, e2e_s):
    some = load(rate, long_output_tokens=24.0, e2e_s=e2e_s)
    states, found = chain(some, TABLE, SPEC), pace(some)
    taken = min(rate, 0.97 * float(states.leave_per_s[-1].max()))
    long_s = found.prompt_s + 24.0 * (found.mean_requests / taken - found.prompt_s) / 16.0
    free = pace(load(rate))
    assert found.mean_requests <= free.mean_requests * (1 + 1e-9)
    fastest = pace(some, tbt_s=1e-9)  # every clock but the maximum is closed
    fastest_s = fastest.prompt_s + 24.0 * (fastest.mean_requests / taken - fastest.prompt_s) / 16.0
    assert long_s <= max(e2e_s, 1.1 * fastest_s) * (1 + 1e-9)


def test_the_time_between_tokens_closes_low_clocks():
    step_s = TABLE.seconds[TABLE.cell(4, 18, 0)]
    slow = load(1e-3)
    assert pace(slow, tbt_s=float(step_s[2]) * 1.01).column[3] == 2
    assert (pace(slow, tbt_s=0.001).column == MAXIMUM).all()


@pytest.mark.parametrize("rate", [40.0, 1e4])
def test_a_load_beyond_the_engine_is_taken_for_one_that_fills_it(rate):
    found = pace(load(rate))
    assert found.column[-1] == MAXIMUM and math.isfinite(found.mean_requests)
