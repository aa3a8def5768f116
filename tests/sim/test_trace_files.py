"""The two file forms: what is read, and what is said of a file that is wrong."""

import time
from pathlib import Path

import numpy as np
import pytest

from throttllem.sim.trace_files import read_trace_file
from throttllem.sim.traces import TraceError, load_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:17:03.9799600,4808,10\n"
LINE = '{"timestamp": 1000, "input_length": 3, "output_length": 4, "hash_ids": [1, 2]}\n'
DATA = Path(__file__).parents[2] / "../shared/data/traces"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the reference traces are not beside this checkout")


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
    arrays = read_trace_file(file(text))
    assert arrays.arrival_s.tolist() == pytest.approx([0, 0.2500001], abs=1e-9)
    assert arrays.prompt_tokens.tolist() == [4808, 7]
    assert arrays.output_tokens.tolist() == [10, 9]


def test_mooncake_is_known_by_its_content(file):
    arrays = read_trace_file(file(LINE + "\n" + LINE.replace("1000", "2500.5"), "any.name"))
    assert arrays.arrival_s.tolist() == [1.0, 2.5005]
    assert arrays.prompt_tokens.tolist() == [3, 3]
    assert arrays.output_tokens.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": is empty"),
        (" \n\n", ": is empty"),
        (HEADER, ": has a header and no row"),
        ("hello\n", ":1: 'hello' is not the first line of a known trace; it takes a CSV with TIMESTAMP,"),
        (HEADER.replace("Gen", "Gan") + ROW, ":1: 'TIMESTAMP,ContextTokens,GaneratedTokens' is not the first line"),
        (HEADER.strip() + ",TIMESTAMP\n" + ROW, ":1: 'TIMESTAMP,ContextTokens,GeneratedTokens,TIMESTAMP' is not"),
        (HEADER + ROW * 15 + ROW.replace("10", "abc"), ":17: GeneratedTokens = 'abc': must be a whole number of 1 or"),
        (
            HEADER + ROW + "\n" + ROW.replace("4808", "0"),
            ":4: ContextTokens = '0': must be a whole number of 1 or more",
        ),
        (HEADER + ROW.replace("10", "-3"), ":2: GeneratedTokens = '-3': must be a whole number"),
        (HEADER + ROW.replace("10", "2.5"), ":2: GeneratedTokens = '2.5': must be a whole number"),
        (HEADER + ROW.replace("10", "99999999999999999999"), ":2: GeneratedTokens = '99999999999999999999': must"),
        (HEADER + "2023-11-16 18:17:03,5\n", ":2: GeneratedTokens is missing: must be a whole number"),
        (HEADER + ROW + ROW.strip() + ",4\n", ":3: has 4 fields where the header has 3"),
        (HEADER + ROW.replace("2023-11-16", "16.11.23"), ":2: TIMESTAMP = '16.11.23 18:17:03.9799600': must be a time"),
        (HEADER + ROW.replace("2023", "9999"), ":2: TIMESTAMP = '9999-11-16 18:17:03.9799600': must be a time like"),
        (HEADER.encode() + ROW.encode() + b"\xff,1,1\n", ":3: is not UTF-8 text"),
        (LINE + LINE[:19], ":2: '{\"timestamp\": 1000,' is not JSON"),
        (LINE + "[1]\n", ":2: '[1]' is not a JSON object"),
        (LINE + '{"timestamp": 1, "input_length": 3}\n', ":2: output_length is missing"),
        (LINE + LINE.replace("4", "0"), ":2: output_length = 0: must be a whole number of 1 or more"),
        (LINE + LINE.replace("3", '"3"'), ":2: input_length = '3': must be a whole number of 1 or more"),
        (LINE.replace("4", "true"), ":1: output_length = True: must be a whole number of 1 or more"),
        (LINE.replace("1000", "NaN"), ":1: timestamp = nan: must be a number of milliseconds"),
    ],
)
def test_bad_content(file, text, message):
    path = file(text)
    with pytest.raises(TraceError) as caught:
        load_trace(str(path))
    assert str(caught.value).startswith(f"{path}{message}")


def test_no_such_file_names_the_nearest_generator(tmp_path):
    with pytest.raises(TraceError, match="is a directory"):
        load_trace(str(tmp_path))
    with pytest.raises(TraceError, match=r"nope\.csv: no such file, nor a generator \(there are azure-conv-like"):
        load_trace(str(tmp_path / "nope.csv"))
    with pytest.raises(TraceError, match=r"no such file, nor a generator .did you mean 'azure-code-like'"):
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
        assert trace.prompt_tokens.mean() == pytest.approx(prompt_mean, abs=0.01)
        assert trace.output_tokens.mean() == pytest.approx(answer_mean, abs=0.01)


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
        made, measured = (np.quantile(getattr(trace, field), fractions) for trace in (ours, theirs))
        assert made == pytest.approx(measured, rel=0.2)
