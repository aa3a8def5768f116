"""Which clocks meet every SLO: the arrays against naive loops over clocks and iterations, in exact fractions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.toy import SPEC, flat_table, hull, sequence, spec
from throttllem.core.clocks.policy import at_least, feasible, least_energy, lowest_feasible, unmeetable
from throttllem.core.forecast.horizon import look_ahead
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import project
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import Reason, Slo

CLOCKS = len(SPEC.clocks_mhz)
FIRST, BASE_S = 20, 8.0


@st.composite
def tables(draw):
    """Random steps in 1/1024 s, faster at each higher clock or not: nothing may rely on it."""
    bins = {
        "batch_bin": draw(st.integers(1, 4)),
        "kv_bin": draw(st.integers(1, 4)),
        "prefill_bin": draw(st.integers(1, 3)),
    }
    arrays = {name: np.minimum(np.arange(40) // draw(st.integers(1, 9)), count - 1) for name, count in bins.items()}
    cells = math.prod(int(array[-1]) + 1 for array in arrays.values())
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return PerformanceTable(
        clocks_mhz=SPEC.clocks_mhz,
        seconds=(rng.integers(1, 65, (cells, CLOCKS)) / 1024).astype(np.float32),
        watts=rng.integers(50, 400, (cells, CLOCKS)).astype(np.float32),
        hull=hull(SPEC),
        **{name: array.astype(np.int32) for name, array in arrays.items()},
    )


sixteenths = st.none() | st.integers(1, 200).map(lambda n: n / 16)
slos = st.builds(Slo, e2e_s=sixteenths, tbt_s=st.none() | st.integers(8, 64).map(lambda n: n / 512), ttft_s=sixteenths)
drawn = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), slos), max_size=4)


@st.composite
def boards(draw):
    board = Scoreboard(SPEC.block_tokens)
    for key, (prompt, output, slo) in enumerate(draw(drawn)):
        board.dispatch(sequence(key, prompt, output + 5, slo=slo, arrival_s=4.0))
        board.begin(key, FIRST - draw(st.integers(1, 5)), 6.0)
    for key, (prompt, output, slo) in enumerate(draw(drawn), start=10):
        board.dispatch(sequence(key, prompt, output, slo=slo, arrival_s=5.0, earliest=FIRST))
    if not len(board):
        board.dispatch(sequence(99, 3, 3, slo=Slo(e2e_s=4.5), arrival_s=4.0))
    for r in board.sequences():
        if draw(st.integers(0, 9)) == 0:
            board.mark_lost(r)
    return board


def walk(board, table, projection, column, delay_s, stretch=1.0):
    """(iteration, its seconds, when it ends, deadlines that end with it) at one clock, iteration by iteration."""
    order = [board.at(slot) for slot in range(len(board.running))] + list(board.pending.values())
    now_s = delay_s
    for k in range(projection.horizon):
        cell = (int(projection.batch[k]), int(projection.kv_blocks[k]), int(projection.prefill_tokens[k]))
        step_s = table.at(SPEC.clocks_mhz[column], *cell)[0] * stretch
        now_s += step_s
        deadlines = [
            (
                r,
                r.limits().deadline_s - BASE_S,
                r.request.slo.e2e_s,
                0.1 * r.limits().tbt_s * max(1, r.output_tokens - 1),
            )
            for r, end in zip(order, projection.ends, strict=True)
            if end == k + 1
        ]
        for r, start in zip(board.pending.values(), projection.starts, strict=True):
            if start == k and r.request.slo.ttft_s and not r.lost:
                deadlines.append((r, r.request.arrival_s + r.request.slo.ttft_s - BASE_S, None, math.inf))
        yield k, step_s, now_s, deadlines


def naive_holds(board, table, projection, column, delay_s, stretch, margin, reserve):
    keep = 1 - margin
    tbt_s = min((r.limits().tbt_s for r in board.sequences()), default=math.inf)
    for k, step_s, now_s, deadlines in walk(board, table, projection, column, delay_s, stretch):
        if projection.prefill_tokens[k] == 0 and step_s > tbt_s * keep:
            return False
        for _, deadline_s, e2e_s, most_s in deadlines:
            if now_s > (deadline_s - min(reserve * (e2e_s or 0.0), most_s)) * keep:
                return False
    return True


quarters = st.sampled_from([0.0, 0.25])
delays = st.lists(st.integers(0, 16).map(lambda n: n / 64), min_size=CLOCKS, max_size=CLOCKS)


stretches = st.lists(st.sampled_from([1.0, 1.25, 1.5]), min_size=CLOCKS, max_size=CLOCKS)


@given(boards(), tables(), delays, stretches, quarters, quarters)
def test_feasible_and_lowest_equal_the_naive_loops(board, table, delay_s, stretch, margin, reserve):
    projection = project(board, SPEC, first=FIRST)
    ahead = look_ahead(board, SPEC, table, projection, base_s=BASE_S)
    holds, run = feasible(
        ahead, board, table, delay_s=np.array(delay_s), margin=margin, reserve=reserve, stretch=np.array(stretch)
    )
    expected = [
        naive_holds(board, table, projection, c, delay_s[c], stretch[c], margin, reserve) for c in range(CLOCKS)
    ]
    assert holds.tolist() == expected
    binding = None if run is None else ahead.binding(board, run)
    plan = lowest_feasible(holds, SPEC, binding)
    if not any(expected):
        assert (plan.mhz, plan.why) == (SPEC.clocks_mhz[-1], Reason.INFEASIBLE)
        return
    lowest = expected.index(True)
    assert plan.mhz == SPEC.clocks_mhz[lowest]
    assert plan.why is (Reason.LOWEST_FEASIBLE if lowest else Reason.LOWEST_CLOCK)
    assert (run is None) == (lowest == 0)
    assert lowest or plan.binding is None
    if plan.binding is not None:
        assert not binding.lost and binding.request.slo != Slo()


@given(boards(), tables(), st.integers(0, 16).map(lambda n: n / 64))
def test_unmeetable_equals_the_naive_loop(board, table, delay_s):
    projection = project(board, SPEC, first=FIRST)
    ahead = look_ahead(board, SPEC, table, projection, base_s=BASE_S)
    walked = walk(board, table, projection, CLOCKS - 1, delay_s)
    late = {r.request.id for _, _, now_s, deadlines in walked for r, deadline_s, *_ in deadlines if now_s > deadline_s}
    assert {r.request.id for r in unmeetable(ahead, board, table, delay_s)} == late


@given(boards(), tables())
def test_the_horizons_joules_equal_the_naive_sum(board, table):
    projection = project(board, SPEC, first=FIRST)
    ahead = look_ahead(board, SPEC, table, projection, base_s=BASE_S)
    for column, mhz in enumerate(SPEC.clocks_mhz):
        each = [
            table.at(mhz, int(b), int(v), int(p))
            for b, v, p in zip(projection.batch, projection.kv_blocks, projection.prefill_tokens, strict=True)
        ]
        expected_j = sum(step_s * (step_w - 40.0) for step_s, step_w in each)
        assert ahead.joules(table, 40.0)[column] == pytest.approx(expected_j, rel=1e-5, abs=1e-4)


def test_the_binding_request_rules_out_the_lower_clock():
    """Two requests end in different iterations; the deadline of the second is the tighter one."""
    table = flat_table([8, 6, 4, 2, 1])
    board = Scoreboard(4)
    for key, (output, e2e_s) in enumerate([(8, 5.0), (16, 4.0 + 50 / 1024)]):
        board.dispatch(sequence(key, 4, output, slo=Slo(e2e_s=e2e_s), arrival_s=4.0))
        board.begin(key, FIRST - 1, 6.0)
    ahead = look_ahead(board, SPEC, table, project(board, SPEC, first=FIRST), base_s=BASE_S)
    # 15 iterations in 50/1024 s: at most 3.3/1024 each, so the fourth clock.
    holds, run = feasible(ahead, board, table, delay_s=np.zeros(CLOCKS), margin=0.0, reserve=0.0)
    assert holds.tolist() == [False, False, False, True, True]
    assert ahead.binding(board, run).request.id == 1


@pytest.mark.parametrize(
    ("holds", "cost", "mhz", "why"),
    [
        ("11111", [5, 4, 3, 4, 5], 1000, Reason.LEAST_ENERGY),
        ("00111", [1, 1, 3, 4, 5], 1000, Reason.LOWEST_FEASIBLE),
        ("00111", [1, 1, 5, 3, 4], 1200, Reason.LEAST_ENERGY),
        ("11111", [3, 3, 3, 4, 5], 1000, Reason.LEAST_ENERGY),
        ("11111", [1, 2, 3, 4, 5], 600, Reason.LEAST_ENERGY),
        ("00000", [1, 2, 3, 4, 5], 1400, Reason.INFEASIBLE),
        ("10100", [2, 1, 1, 0, 0], 1000, Reason.LEAST_ENERGY),
        ("00011", [1, 1, 1, math.inf, math.inf], 1400, Reason.LEAST_ENERGY),
    ],
)
def test_least_energy(holds, cost, mhz, why):
    binding = sequence(7, 1, 1)
    plan = least_energy(np.array([c == "1" for c in holds]), np.array(cost, dtype=float), spec(), binding)
    assert (plan.mhz, plan.why) == (mhz, why)
    assert plan.binding == (7 if why in {Reason.LOWEST_FEASIBLE, Reason.INFEASIBLE} else None)


@pytest.mark.parametrize(
    ("holds", "column", "mhz", "why"),
    [
        ("11111", 2, 1000, Reason.LEAST_ENERGY),
        ("00011", 2, 1200, Reason.LOWEST_FEASIBLE),
        ("11000", 2, 800, Reason.LEAST_ENERGY),
        ("00000", 2, 1400, Reason.INFEASIBLE),
    ],
)
def test_at_least(holds, column, mhz, why):
    binding = sequence(7, 1, 1)
    plan = at_least(np.array([c == "1" for c in holds]), column, spec(), binding)
    assert (plan.mhz, plan.why) == (mhz, why)
    assert plan.binding == (None if why is Reason.LEAST_ENERGY else 7)
