"""The recorder on figures that can be counted by hand."""

import math

import numpy as np
import pytest
from core.toy import request
from hypothesis import given
from hypothesis import strategies as st
from sim.toy_runs import simulate, specs_of

from throttllem.core.forecast.projection import Projection
from throttllem.core.types import Slo
from throttllem.sim.recorder import Life, Recorder
from throttllem.sim.samples import quantiles


def run(
    recorder, at_s, seconds, joules, mhz, *, rows=1, kv_blocks=10, prompts=(), serving=True, projection=None, index=0
):
    """One iteration, as an engine writes it down."""
    tokens = sum(tokens for _, tokens in prompts)
    recorder.steps[recorder.filled] = (at_s, seconds, joules, mhz, rows, len(prompts), tokens, kv_blocks)
    recorder.ran(1, mhz, first=index, projection=projection, serving=serving)
    for request_id, _ in prompts:
        recorder.prompt(request_id, at_s)


def result(recorder, slo=None, duration_s=10.0, energy_j=100.0):
    return recorder.result(
        policy="p", slo=slo or Slo(), duration_s=duration_s, energy_j=energy_j, idle_energy_j=5.0, lost=0, preemptions=0
    )


def life(key, begun_s, first_token_s, ended_s, answer=3, **slo):
    return Life(request(key, 10, answer, slo=Slo(**slo)), begun_s, first_token_s, ended_s)


def book(*lives):
    recorder = Recorder(bin_s=1.0)
    for one in lives:
        recorder.arrived(one.request)
        recorder.lives[one.request.id] = one
        if one.ended_s is not None:
            recorder.ended(one.request.id, one.ended_s, 0.0)
    return recorder


def test_times_of_requests():
    found = result(book(life(1, 1.0, 2.0, 4.0), life(2, 0.5, 1.0, 1.0, answer=1), life(3, None, None, None)))
    assert (found.requests, found.completed, found.rejected) == (3, 2, 1)
    assert (found.prompt_tokens, found.generated_tokens, found.tokens_per_joule) == (20, 4, 0.04)
    assert found.e2e_s.mean == 2.5 and found.ttft_s.mean == 1.5 and found.queue_s.mean == 0.75
    # (4 - 2) / 2 gaps; an answer of one token has none.
    assert found.tpot_s.mean == 1.0
    assert found.distributions.tpot_s == [1.0] and sorted(found.distributions.e2e_s) == [1.0, 4.0]


def test_attainment_counts_the_rejected_as_missed():
    meets = life(1, 0.0, 1.0, 3.0, e2e_s=3.0, tbt_s=1.0, ttft_s=1.0)
    # Two gaps of 1.25 s on the mean.
    slow = life(2, 0.0, 1.0, 3.5, e2e_s=3.0, tbt_s=1.1, ttft_s=0.5)
    free = life(3, 0.0, 9.0, 99.0)
    gone = life(4, None, None, None)
    slo = result(book(meets, slow, free, gone)).slo
    assert (slo.e2e_attainment, slo.tbt_attainment, slo.ttft_attainment) == (0.5, 0.5, 0.5)
    assert (slo.attainment, slo.completed_attainment) == (0.5, pytest.approx(2 / 3))


def test_nothing_at_all():
    found = result(Recorder(bin_s=1.0), energy_j=0.0)
    assert (found.requests, found.tokens_per_joule, found.mean_clock_mhz, found.slo.attainment) == (0, 0.0, 0.0, 0.0)
    assert found.e2e_s.mean is None and found.tbt_s.p99 is None and found.projection_error is None


def test_gaps_count_once_for_each_row_that_decodes():
    recorder = book(life(1, None, 1.0, None))
    run(recorder, 0.0, 9.0, 1.0, 1000, rows=0, prompts=((1, 4),))
    run(recorder, 1.0, 0.01, 1.0, 1000, rows=9)
    run(recorder, 2.0, 0.05, 1.0, 1000)
    found = result(recorder)
    assert found.tbt_s.mean == pytest.approx((9 * 0.01 + 0.05) / 10)
    assert (found.tbt_s.p50, found.tbt_s.p90, found.tbt_s.p99) == (0.01, 0.01, 0.05)
    assert sum(found.distributions.tbt_counts) == 10
    assert len(found.distributions.tbt_edges_s) == len(found.distributions.tbt_counts) + 1
    assert recorder.lives[1].begun_s == 0.0


def test_clock_batch_and_kv_are_means_over_busy_time_of_the_serving_engine():
    recorder = Recorder(bin_s=1.0)
    run(recorder, 0.0, 0.1, 7.0, 1000, rows=2, kv_blocks=10)
    run(recorder, 0.5, 0.3, 9.0, 600, rows=4, kv_blocks=30)
    run(recorder, 0.5, 0.4, 1.0, 1400, rows=9, kv_blocks=99, serving=False)
    recorder.idle(1.0, 2.0, 50.0)
    series = result(recorder).series
    assert series.clock_mhz == [pytest.approx(700.0), None]
    assert series.batch == [pytest.approx(3.5), None] and series.kv_blocks == [pytest.approx(25.0), None]
    assert series.power_w == [17.0, 50.0] and series.time_s == [0.0, 1.0]
    assert result(recorder).mean_clock_mhz == pytest.approx((100 + 180 + 560) / 0.8)
    assert result(recorder).busy_s_by_mhz == {600: 0.3, 1000: 0.1, 1400: 0.4}


def test_projection_error_is_the_mean_over_iterations():
    recorder = Recorder(bin_s=1.0)
    none = np.zeros(0, dtype=np.int64)
    projection = Projection(
        first=5, batch=np.array([4, 2]), kv_blocks=np.array([10, 30]), prefill_tokens=none, ends=none, starts=none
    )
    for index, rows, blocks in ((5, 4, 8), (6, 4, 30), (7, 1, 5)):
        run(recorder, 0.0, 0.1, 1.0, 1000, rows=rows, kv_blocks=blocks, projection=projection, index=index)
    # Batch: right, half, all missed (the projection had ended). KV: 2 of 8 too many, right, all missed.
    error = result(recorder).projection_error
    assert (error.batch, error.kv) == (pytest.approx((0 + 0.5 + 1) / 3), pytest.approx((0.25 + 0 + 1) / 3))
    assert result(recorder).series.batch_projected == [pytest.approx((4 + 2 + 0) / 3)]


def test_gpus_and_queue_over_time():
    recorder = Recorder(bin_s=1.0)
    recorder.state(0.1, 3, 4)
    recorder.state(0.2, 5, 4)
    recorder.state(2.5, 1, 5)
    recorder.state(2.6, 0, 1)
    recorder.idle(3.0, 5.0, 1.0)
    recorder.state(4.5, 0, 1)
    series = result(recorder).series
    # A bin shows the most GPUs that were up in it, and what was up before where nothing changed.
    assert series.tp == [4, 4, 5, 1, 1]
    assert series.queue[0] == 5 and series.queue[2] == 1 and series.queue[4] == 0


@given(st.floats(1e-3, 50.0), st.floats(0.0, 1e4), st.floats(0.0, 20.0))
def test_idle_power_is_spread_evenly(bin_s, from_s, bins):
    recorder = Recorder(bin_s=bin_s)
    from_s = min(from_s, 300 * bin_s)
    to_s = from_s + bins * bin_s
    recorder.idle(from_s, to_s, 100.0)
    power_w = result(recorder).series.power_w
    assert sum(power_w) * bin_s == pytest.approx(100.0 * (to_s - from_s), rel=1e-6, abs=1e-9)
    assert max(power_w, default=0.0) <= 100.0 * (1 + 1e-6)


@given(st.lists(st.tuples(st.floats(0.0, 9.0), st.integers(1, 9)), min_size=1, max_size=30))
def test_weighted_quantiles_are_those_of_the_repeated_values(pairs):
    values, weights = np.array([v for v, _ in pairs]), np.array([w for _, w in pairs])
    repeated = np.repeat(values, weights)
    found, plain = quantiles(values, weights), quantiles(repeated)
    assert (found.p50, found.p90, found.p99) == (plain.p50, plain.p90, plain.p99)
    assert found.mean == pytest.approx(repeated.mean())
    ranked = sorted(repeated.tolist())
    assert plain.p50 == ranked[max(0, math.ceil(0.5 * len(ranked)) - 1)]
    assert plain.p99 == ranked[max(0, math.ceil(0.99 * len(ranked) - 1e-9) - 1)]


def test_the_wait_of_a_preempted_request_is_a_gap_like_any_other():
    requests = [request(key, 8, 40, max_tokens=40, arrival_s=0.0, slo=Slo()) for key in range(12)]
    run = simulate(requests, specs=specs_of(no_evict=False))
    result = run.result()
    assert result.preemptions > 0
    gaps = sum(r.output_tokens - 1 for r in requests)
    assert sum(result.distributions.tbt_counts) == gaps
    assert result.tbt_s.mean == pytest.approx(result.tpot_s.mean, rel=1e-6)
