"""Trace: peak, scaling, cutting, digest, and the whole of load_trace."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.sim.traces import Trace, TraceError, load_trace


def make(arrival_s, prompt=5, answer=6):
    size = len(arrival_s)
    return Trace(
        name="t",
        source="t",
        arrival_s=np.array(arrival_s, np.float64),
        prompt_tokens=np.full(size, prompt, np.int64),
        output_tokens=np.full(size, answer, np.int64),
    )


def naive_peak(trace):
    """The definition, in a loop."""
    times = trace.arrival_s.tolist()
    return max(sum(t <= u < t + 60 for u in times) for t in times) / 60


def test_peak_of_a_long_trace_is_the_busiest_minute():
    # The minute from 100 s holds 100, 130 and 159.9, and not 160 any more.
    assert make([0, 100, 130, 159.9, 300]).peak_rps == 3 / 60
    assert make([0, 100, 130, 160, 300]).peak_rps == 2 / 60
    assert make([0, 100, 200]).peak_rps == 1 / 60


def test_peak_of_a_short_trace_is_its_mean():
    assert make([0, 4, 10]).peak_rps == 0.3
    assert make([0]).peak_rps == 1 / 60
    assert make([0, 0, 0]).peak_rps == 3 / 60


@given(st.lists(st.floats(0, 500), min_size=2, max_size=60), st.floats(0.02, 3))
def test_scaled_peak_is_the_rate_asked_for(gaps, peak_rps):
    """Never above, and at most one request a minute below: a window cannot hold part of a request."""
    trace = make(np.concatenate(([0.0], np.cumsum(gaps))))
    try:
        scaled = trace.scaled(peak_rps=peak_rps)
    except TraceError:
        # Refused only where one instant alone holds more than the minute may.
        k = int(60 * peak_rps + 1e-9)
        assert (trace.arrival_s[k:] - trace.arrival_s[:-k]).min() <= 1e-9
        return
    if scaled.duration_s >= 60:
        assert scaled.peak_rps == naive_peak(scaled)
        assert scaled.peak_rps <= peak_rps + 1e-9
    elif trace.duration_s > 1e-9:
        assert scaled.peak_rps == pytest.approx(peak_rps, rel=1e-9)


@pytest.mark.parametrize("peak_rps", [0.5, 2.0, 8.25, 20.0])
def test_scaling_a_real_shape_is_exact_for_whole_requests_a_minute(peak_rps):
    trace = load_trace("azure-conv-like:seconds=900")
    scaled = trace.scaled(peak_rps=peak_rps)
    assert scaled.peak_rps == peak_rps
    # A uniform stretch: every arrival by the same factor, nothing else touched.
    factor = scaled.duration_s / trace.duration_s
    assert scaled.arrival_s == pytest.approx(trace.arrival_s * factor)
    assert scaled.prompt_tokens is trace.prompt_tokens


def test_scaling_between_whole_requests_rounds_down():
    assert load_trace("azure-conv-like:seconds=900").scaled(peak_rps=2.01).peak_rps == 2.0


def test_the_trace_is_stretched_no_more_than_needed():
    scaled = make(range(0, 1000, 10)).scaled(peak_rps=0.05)
    assert scaled.peak_rps == 0.05
    # Three a minute from six a minute: twice as long, to within rounding.
    assert scaled.duration_s == pytest.approx(990 * 2, rel=1e-9)


@pytest.mark.parametrize("peak_rps", [0, -1, 0.016, float("nan"), float("inf")])
def test_scaling_refuses_what_no_minute_can_be(peak_rps):
    with pytest.raises(TraceError, match="must be at least 1/60"):
        make([0, 100]).scaled(peak_rps=peak_rps)


def test_scaling_refuses_requests_that_come_together():
    with pytest.raises(TraceError, match="over 2 requests come at one instant"):
        make([0, 5, 5, 5, 90]).scaled(peak_rps=2 / 60)
    together = make([0, 0])
    assert together.scaled(peak_rps=1).arrival_s.tolist() == [0, 0]


def test_cut_keeps_what_comes_before():
    cut = make([0, 1, 2, 3]).cut(2)
    assert cut.arrival_s.tolist() == [0, 1]
    assert cut.prompt_tokens.size == cut.output_tokens.size == 2
    for seconds in (0, -1, float("nan")):
        with pytest.raises(TraceError, match="must be a positive number"):
            make([0, 1]).cut(seconds)


def test_digest_is_of_the_requests_alone():
    trace = make([0, 1, 2])
    assert trace.sha256 == make([0, 1, 2]).sha256
    assert len({trace.sha256, make([0, 1, 3]).sha256, make([0, 1, 2], prompt=4).sha256, trace.cut(2).sha256}) == 4
    assert make([0, 1], prompt=5, answer=6).sha256 != make([0, 1], prompt=6, answer=5).sha256


def test_arrays_cannot_be_written():
    trace = load_trace("poisson:seconds=30")
    for array in (trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.cut(5).arrival_s):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_rows_out_of_order_are_sorted_and_start_at_zero(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [(3000, 1), (1000, 2), (3000, 3), (1500, 4)]
    path.write_text("".join(f'{{"timestamp": {t}, "input_length": {n}, "output_length": 9}}\n' for t, n in rows))
    trace = load_trace(str(path))
    assert trace.arrival_s.tolist() == [0, 0.5, 2, 2]
    assert trace.prompt_tokens.tolist() == [2, 4, 1, 3]
    assert (trace.name, trace.source) == ("mixed", str(path))


def test_requests_of_one_instant_keep_their_order(tmp_path):
    path = tmp_path / "ties.jsonl"
    rows = [((n + 1) % 2 * 1000, n) for n in range(1, 201)]
    path.write_text("".join(f'{{"timestamp": {t}, "input_length": {n}, "output_length": 9}}\n' for t, n in rows))
    assert load_trace(str(path)).prompt_tokens.tolist() == [n for _, n in sorted(rows)]


def test_load_scales_first_and_cuts_then():
    spec = "poisson:rate=4,input=50,output=8,seconds=600,seed=3"
    whole = load_trace(spec)
    both = load_trace(spec, peak_rps=1.0, seconds=100)
    assert (whole.name, whole.source) == ("poisson", spec)
    assert whole.arrival_s[0] == 0
    assert both.arrival_s.tolist() == whole.scaled(peak_rps=1.0).cut(100).arrival_s.tolist()
    assert both.duration_s < 100


def test_seed_argument_and_option():
    assert (
        load_trace("azure-conv-like:seconds=60", seed=5).sha256
        == load_trace("azure-conv-like:seconds=60,seed=5").sha256
    )
    assert load_trace("azure-conv-like:seconds=60", seed=5).sha256 != load_trace("azure-conv-like:seconds=60").sha256


@pytest.mark.parametrize("spec", ["poisson:rate", "poisson:rate=1,rate=2", "poisson:=3"])
def test_malformed_options(spec):
    with pytest.raises(TraceError, match=r"poisson: (option|unknown option)"):
        load_trace(spec)
