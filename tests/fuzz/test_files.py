"""Files that users give or that were damaged on disk: read, or an error of the documented kind that names the file."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
from core.toy import spec, table
from gateway.flight.flights import busy, recorded_world
from hypothesis import strategies as st
from sim.traces import written

from tests.fuzz.properties import fuzzed, mutated
from throttllem.config import Options
from throttllem.core.forecast.performance_table import Calibrated
from throttllem.core.forecast.switch_latency import ProfiledSwitches
from throttllem.gateway.flight.replay import ReplayError, replay
from throttllem.option_sources import ConfigurationError, leaves, load_options
from throttllem.profiling.storage import TableFileError, load_table, save_table
from throttllem.sim.traces.trace import TraceError, load_trace

ROOT = Path(__file__).parents[2]
NUMBERS = [
    b"null", b"-1", b"0", b"1e300", b"1e999", b"NaN", b"9" * 30, b"9" * 5000, b'""', b"[]", b"{}",
    b"[" * 2000, b"true", b"\n",
    b"\x00", b"\xff", b",", b";", b'"', b"\xef\xbb\xbf", b"1969-01-01 00:00:00", b"9999-12-31 23:59:59.9", b"\xd9\xa3",
]  # fmt: skip


@contextmanager
def file_of(content, name="given"):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


ROWS = [(0.0, 374, 44), (0.84, 1215, 309), (1.31, 86, 412)]
TEXTS = [writer(ROWS) for writer, columns in written.WRITERS.items() if columns is None]
PACKED = written.compressed(written.azure(ROWS), "gz")
COLUMNS = [
    None,
    None,
    "unit=s",
    "unit=ms",
    "arrival=timestamp",
    "prompt=,unit=s",
    "arrival=TIMESTAMP,prompt=ContextTokens",
]


@fuzzed(content=mutated(*TEXTS, PACKED, tokens=NUMBERS), columns=st.sampled_from(COLUMNS), rescaled=st.booleans())
def test_a_trace_is_read_or_refused(content, columns, rescaled):
    with file_of(content) as path:
        read_or_refused(path, columns, rescaled=rescaled)


def read_or_refused(path, columns=None, *, rescaled=False):
    try:
        trace = load_trace(str(path), columns=columns, rescaled=rescaled)
    except TraceError as error:
        assert "Traceback" not in str(error) and "Error(" not in str(error), str(error)
        return
    arrays = trace.arrays
    assert 1 <= trace.requests == len(arrays.prompt_tokens) <= 100
    assert (arrays.prompt_tokens > 0).all() and (arrays.output_tokens > 0).all()
    assert np.isfinite(arrays.arrival_s).all() and (np.diff(arrays.arrival_s) >= 0).all() and arrays.arrival_s[0] >= 0
    trace.described()


READ = "import sys; from tests.fuzz.test_files import read_or_refused; read_or_refused(sys.argv[1])"


@fuzzed(12, content=mutated(written.azure_parquet(ROWS), tokens=NUMBERS))
def test_a_parquet_trace_is_read_or_refused(content):
    """In a process of its own: polars itself ends the process on some damaged files (a page of 2^61 values)."""
    with file_of(content) as path:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, env=env, check=False)
    by_polars = done.returncode == -signal.SIGABRT and "polars" in done.stderr
    assert done.returncode == 0 or by_polars, done.stderr[-2000:]


@cache
def saved_table():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.npz"
        switches = (
            ProfiledSwitches(mhz=600, count=20, within_s=0.02),
            ProfiledSwitches(mhz=1400, count=3, within_s=0.2),
        )
        basis = Calibrated(clocks_mhz=(600, 1400), seconds_error=0.1, watts_error=0.1)
        save_table(replace(table(spec()), switches=switches, calibrated=basis), path)
        return path.read_bytes()


NAMES = ["mark", "version", "clocks_mhz", "clocks_measured", "hull", "gpu", "model", "verdict", "batch_bin", "kv_bin"]
NAMES += ["prefill_bin", "seconds", "watts", "calibrated_at_mhz", "calibrated_errors"]
NAMES += ["switch_clocks_mhz", "switch_counts", "switch_within_s"]
CHANGES = ["gone", "empty", "flat", "nan", "negative", "huge", "text", "other", "scalar"]


def changed(array, how):
    match how:
        case "gone":
            return None
        case "empty":
            return np.array([], dtype=array.dtype)
        case "flat":
            return array.reshape(-1)
        case "nan" if array.dtype.kind == "f":
            return np.full_like(array, np.nan)
        case "negative" if array.dtype.kind in "if":
            return -array - 1
        case "huge" if array.dtype.kind in "if":
            return np.full_like(array, np.iinfo(np.int32).max)
        case "text":
            return np.array('{"faults": 3, "more": 1}')
        case "other":
            return np.array([1.5, 2.5])
    return np.array(3)


@fuzzed(changes=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(CHANGES)), max_size=2))
def test_a_table_of_other_arrays_is_read_or_refused(changes):
    parts = dict(np.load(io.BytesIO(saved_table())))
    for name, how in changes:
        before = parts.get(name)
        parts[name] = changed(np.array([1, 2]) if before is None else before, how)
    out = io.BytesIO()
    np.savez(out, **{name: part for name, part in parts.items() if part is not None})
    read_table(out.getvalue())


@fuzzed(content=st.deferred(lambda: mutated(saved_table())))
def test_a_damaged_table_is_read_or_refused(content):
    read_table(content)


def read_table(content):
    with file_of(content) as path:
        try:
            found = load_table(path)
        except TableFileError as error:
            assert str(path) in str(error)
            return
    step = found.at(found.clocks_mhz[0], 1, 1, 0)
    assert all(np.isfinite(value) and value > 0 for value in step), step


@cache
def record():
    with tempfile.TemporaryDirectory() as name:
        world, recorder = recorded_world(Path(name))
        busy(world, 25)
        recorder.close()
        (path,) = Path(name).glob("*.jsonl")
        tables = {table.name: table.read_bytes() for table in Path(name).glob("table-*.npz")}
        header, *lines = path.read_bytes().splitlines(keepends=True)
        return header, lines, tables


@fuzzed(in_header=st.booleans(), at=st.integers(0, 10**6), cut=st.integers(0, 8), new=st.sampled_from([b"", *NUMBERS]))
def test_a_damaged_flight_record_is_replayed_or_refused(in_header, at, cut, new):
    header, lines, tables = record()
    if in_header:
        at %= len(header)
        header = header[:at] + new + header[at + cut :]
    else:
        number = at % len(lines)
        place = (at // len(lines)) % len(lines[number])
        line = lines[number]
        lines = [*lines[:number], line[:place] + new + line[place + cut :], *lines[number + 1 :]]
    with file_of(header + b"".join(lines), "r.jsonl") as path:
        for name, content in tables.items():
            (path.parent / name).write_bytes(content)
        try:
            replay(path)
        except ReplayError as error:
            assert str(path.parent) in str(error)  # the record, or a table beside it


TOML = b"""policy = "throttllem"
[server]
port = 8001
api_keys = ["one"]
[[engines]]
kind = "openai"
url = "http://a"
[classes.gold]
e2e_s = "3s"
[autoscale.capacity_rps]
1 = 2.5
"""
VALUES = [
    b"[]",
    b"{}",
    b"-1",
    b"nan",
    b"inf",
    b"true",
    b'"none"',
    b"9" * 30,
    b"9" * 5000,
    b'"5 s"',
    b"[[1]]",
    b"1979-05-27",
    b".",
    b"\xff",
]
PATHS = [path for path, _ in leaves(Options())]
settings_ = st.builds(
    "{}={}".format,
    st.sampled_from([*PATHS, "engines.0.url", "engines.1.tp", "classes.a.e2e_s", "classes", "engines", "engines.x", ""])
    | st.text(max_size=6),
    st.sampled_from(["", "none", "1", "-1", "0.5", "5s", "nan", "1e999", "9" * 5000, "true", "[", "[1]", "{}", "a,b"]),
)  # fmt: skip


@fuzzed(toml=mutated(TOML, tokens=VALUES), settings=st.lists(settings_ | st.text(max_size=12), max_size=3))
def test_options_are_read_or_refused(toml, settings):
    with file_of(toml, "c.toml") as path, mock.patch.dict(os.environ, clear=True):
        try:
            loaded = load_options(file=path, settings=settings)
        except ConfigurationError as error:
            assert str(error) and str(error) != "one"
            return
    assert json.dumps([str(value) for _, value in leaves(loaded.options)])
