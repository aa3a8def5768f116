"""Traces: peak, scaling, cutting, digest; the two file formats, and the error for a file that is wrong."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.sim.traces.generators import Arrays
from throttllem.sim.traces.trace import Held, Trace, TraceError, load_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:17:03.9799600,4808,10\n"
LINE = '{"timestamp": 1000, "input_length": 3, "output_length": 4, "hash_ids": [1, 2]}\n'
DATA = Path(__file__).parents[3] / "../shared/data/traces"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the reference traces are not beside this checkout")


def make(arrival_s, prompt=5, answer=6):
    size = len(arrival_s)
    return Trace(
        name="t",
        source="t",
        rows=Held(
            arrays=Arrays(
                np.array(arrival_s, np.float64), np.full(size, prompt, np.int64), np.full(size, answer, np.int64)
            )
        ),
    )


def naive_peak(trace):
    """The definition, in a loop."""
    times = trace.arrays.arrival_s.tolist()
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
def test_scaled_peak_is_the_given_rate(gaps, peak_rps):
    """Never above, and at most one request a minute below: a window cannot hold part of a request."""
    trace = make(np.concatenate(([0.0], np.cumsum(gaps))))
    try:
        scaled = trace.scaled(peak_rps=peak_rps)
    except TraceError:
        # Refused only where one instant alone holds more than the minute may.
        k = int(60 * peak_rps + 1e-9)
        assert (trace.arrays.arrival_s[k:] - trace.arrays.arrival_s[:-k]).min() <= 1e-9
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
    assert scaled.arrays.arrival_s == pytest.approx(trace.arrays.arrival_s * factor)
    assert scaled.arrays.prompt_tokens.tolist() == trace.arrays.prompt_tokens.tolist()


def test_scaling_between_whole_requests_rounds_down():
    assert load_trace("azure-conv-like:seconds=900").scaled(peak_rps=2.01).peak_rps == 2.0


def test_the_trace_is_stretched_no_more_than_needed():
    scaled = make(range(0, 1000, 10)).scaled(peak_rps=0.05)
    assert scaled.peak_rps == 0.05
    # Three a minute from six a minute: twice as long, to within rounding.
    assert scaled.duration_s == pytest.approx(990 * 2, rel=1e-9)


@pytest.mark.parametrize("peak_rps", [0, -1, 0.016, float("nan"), float("inf")])
def test_scaling_refuses_impossible_rates(peak_rps):
    with pytest.raises(TraceError, match="must be at least 1/60"):
        make([0, 100]).scaled(peak_rps=peak_rps)


def test_scaling_refuses_simultaneous_requests():
    with pytest.raises(TraceError, match="over 2 requests arrive at one instant"):
        make([0, 5, 5, 5, 90]).scaled(peak_rps=2 / 60)
    together = make([0, 0])
    assert together.scaled(peak_rps=1).arrays.arrival_s.tolist() == [0, 0]


def test_cut_keeps_requests_before_the_end():
    cut = make([0, 1, 2, 3]).cut(2)
    assert cut.arrays.arrival_s.tolist() == [0, 1]
    assert cut.arrays.prompt_tokens.size == cut.arrays.output_tokens.size == 2
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
    for array in (
        trace.arrays.arrival_s,
        trace.arrays.prompt_tokens,
        trace.arrays.output_tokens,
        trace.cut(5).arrays.arrival_s,
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_rows_out_of_order_are_sorted_and_start_at_zero(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [(3000, 1), (1000, 2), (3000, 3), (1500, 4)]
    path.write_text("".join(f'{{"timestamp": {t}, "input_length": {n}, "output_length": 9}}\n' for t, n in rows))
    trace = load_trace(str(path))
    assert trace.arrays.arrival_s.tolist() == [0, 0.5, 2, 2]
    assert trace.arrays.prompt_tokens.tolist() == [2, 4, 1, 3]
    assert (trace.name, trace.source) == ("mixed", str(path))


def test_requests_of_one_instant_keep_their_order(tmp_path):
    path = tmp_path / "ties.jsonl"
    rows = [((n + 1) % 2 * 1000, n) for n in range(1, 201)]
    path.write_text("".join(f'{{"timestamp": {t}, "input_length": {n}, "output_length": 9}}\n' for t, n in rows))
    assert load_trace(str(path)).arrays.prompt_tokens.tolist() == [n for _, n in sorted(rows)]


def test_a_scaled_trace_is_cut_by_its_new_time():
    whole = load_trace("poisson:rate=4,input=50,output=8,seconds=600,seed=3")
    both = whole.scaled(peak_rps=1.0).cut(100)
    times = whole.scaled(peak_rps=1.0).arrays.arrival_s
    assert both.arrays.arrival_s.tolist() == times[times < 100].tolist()
    assert both.scaled(peak_rps=2.0).requests == both.requests


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


@pytest.fixture
def file(tmp_path):
    def write(content, name="conv.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    "text",
    [
        HEADER + ROW + "2023-11-16 18:17:04.2299601,7,9\n",
        HEADER.replace("\n", "\r\n") + ROW.replace("\n", "\r\n") + "\r\n2023-11-16 18:17:04.2299601,7,9\r\n\r\n",
        "\ufeff" + HEADER + ROW.replace(" ", "T").replace("600,", "600Z,") + "2023-11-16 18:17:04.2299601+00:00,7,9",
        "GeneratedTokens,Model,TIMESTAMP,ContextTokens\n10,m,2023-11-16 18:17:03.9799600,4808\n9,,"
        "2023-11-16 18:17:04.2299601,7",
    ],
)
def test_azure(file, text):
    trace = load_trace(str(file(text)))
    assert trace.arrays.arrival_s.tolist() == pytest.approx([0, 0.2500001], abs=1e-9)
    assert trace.arrays.prompt_tokens.tolist() == [4808, 7]
    assert trace.arrays.output_tokens.tolist() == [10, 9]


def test_mooncake_is_recognised_by_its_content(file):
    trace = load_trace(str(file(LINE + "\n" + LINE.replace("1000", "2500.5"), "any.name")))
    assert trace.arrays.arrival_s.tolist() == pytest.approx([0, 1.5005])
    assert trace.arrays.prompt_tokens.tolist() == [3, 3]
    assert trace.arrays.output_tokens.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": is empty"),
        (" \n\n", ": is empty"),
        (HEADER, ": has no request; it has no row"),
        (
            "hello\n",
            ":1: columns hello are of no known trace (Azure LLM 2023/2024, BurstGPT, Mooncake, ServeGen, aiper",
        ),
        (HEADER.replace("Gen", "Gan") + ROW, ":1: columns ContextTokens, GaneratedTokens, TIMESTAMP are of no known"),
        (HEADER.strip() + ",TIMESTAMP\n" + ROW, ":1: column TIMESTAMP is there 2 times; leave one"),
        ("1.5,20,30\n2.5,20,30\n", ":1: '1.5,20,30' is no header; write the names of the columns"),
        (HEADER + ROW * 15 + ROW.replace("10", "abc"), ":17: GeneratedTokens = 'abc': must be a whole number of"),
        (HEADER + ROW + "\n" + ROW.replace("4808", "x"), ":4: ContextTokens = 'x': must be a whole number of tokens"),
        (HEADER + ROW.replace("10", "-3"), ":2: GeneratedTokens = '-3': must be a whole number"),
        (HEADER + ROW.replace("10", "2.5"), ":2: GeneratedTokens = '2.5': must be a whole number"),
        (HEADER + ROW.replace("10", "99999999999999999999"), ":2: GeneratedTokens = '99999999999999999999': must"),
        (HEADER + "2023-11-16 18:17:03,5\n", ": has no request; rows left out: 1 no output tokens"),
        (HEADER + ROW + ROW.strip() + ",4\n", ":3: has 4 fields where the header has 3"),
        (HEADER + ROW.replace("2023-11-16", "16.11.23"), ":2: TIMESTAMP = '16.11.23 18:17:03.9799600': must be a time"),
        (HEADER + ROW.replace("2023", "9999"), ":2: TIMESTAMP = '9999-11-16 18:17:03.9799600': must be a time like"),
        (
            HEADER + "1.5,3,4\n",
            ":2: TIMESTAMP = '1.5': must be a time like 2023-11-16 18:17:03.9799600, or, of numbers, ",
        ),
        (HEADER.encode() + ROW.encode() + b"\xff,1,1\n", ":3: TIMESTAMP = '\ufffd': must be a time"),
        (HEADER + ",4,5\n", ":2: TIMESTAMP is missing: must be a time"),
        (
            HEADER + ROW * 3,
            ": all 3 requests arrive at one instant; name the column of arrivals with --columns arrival=",
        ),
        (LINE + LINE[:19], ":2: '{\"timestamp\": 1000,' is not a JSON object"),
        (LINE + "[1]\n", ":2: '[1]' is not a JSON object"),
        (LINE + LINE.replace("4,", '"4x",'), ":2: output_length = '4x': must be a whole number of tokens"),
        (LINE.replace("4,", "true,"), ":1: output_length = 'true': must be a whole number of tokens"),
        (LINE.replace("1000", '"soon"'), ":1: timestamp = 'soon': must be a number of ms; another unit, or a column"),
    ],
)
def test_bad_content(file, text, message):
    path = file(text)
    with pytest.raises(TraceError) as caught:
        load_trace(str(path))
    assert str(caught.value).startswith(f"{path}{message}")


def test_no_such_file_names_the_nearest_generator(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceError, match="is no file that can be read twice"):
        load_trace(str(tmp_path / "pipe"))
    with pytest.raises(TraceError, match="is a directory"):
        load_trace(str(tmp_path))
    with pytest.raises(TraceError, match=r"nope\.csv: no such file, nor a generator; known: azure-conv-like"):
        load_trace(str(tmp_path / "nope.csv"))
    with pytest.raises(TraceError, match=r"no such file, nor a generator; did you mean azure-code-like\?"):
        load_trace("azure-cod-like:seconds=3")


@needs_data
@pytest.mark.parametrize(
    ("name", "requests", "duration_s", "prompt_mean", "answer_mean", "peak_rps"),
    [
        ("azure_llm_2023_conv_first_half.csv", 9740, 1750.93, 1237.14, 221.28, 8.55),
        ("azure_llm_2023_code.csv", 8819, 3435.95, 2047.85, 27.88, 12.05),
        ("mooncake_synthetic.jsonl", 3993, 1022.03, None, None, 280 / 60),
    ],
)
def test_reference_traces(name, requests, duration_s, prompt_mean, answer_mean, peak_rps):
    """The expected figures were taken from the files apart from this code, rounded to two places."""
    trace = load_trace(str(DATA / name))
    assert trace.requests == requests
    assert trace.duration_s == pytest.approx(duration_s, abs=0.01)
    assert trace.peak_rps == pytest.approx(peak_rps)
    if prompt_mean is not None:
        assert trace.arrays.prompt_tokens.mean() == pytest.approx(prompt_mean, abs=0.01)
        assert trace.arrays.output_tokens.mean() == pytest.approx(answer_mean, abs=0.01)


@needs_data
def test_the_chat_trace_loads_at_once():
    path = str(DATA / "azure_llm_2023_conv_first_half.csv")
    tries_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        load_trace(path)
        tries_s.append(time.perf_counter() - start_s)
    assert min(tries_s) < 0.2


@needs_data
@pytest.mark.parametrize(
    ("like", "real", "fractions"),
    [
        ("azure-conv-like", "azure_llm_2023_conv_first_half.csv", (0.25, 0.5, 0.75)),
        ("azure-code-like", "azure_llm_2023_code.csv", (0.25, 0.5, 0.75, 0.9, 0.95)),
    ],
)
def test_generated_lengths_have_the_shape_of_the_real_ones(like, real, fractions):
    """Within 20 %: the knots are rounded, and the chat file is half of the trace that the figures describe."""
    ours, theirs = load_trace(like), load_trace(str(DATA / real))
    for field in ("prompt_tokens", "output_tokens"):
        made, measured = (np.quantile(getattr(trace.arrays, field), fractions) for trace in (ours, theirs))
        assert made == pytest.approx(measured, rel=0.2)
