"""A week of traffic in bounded memory: read, scaled and simulated from a file of five million rows."""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

pytestmark = pytest.mark.slow

ROWS = 5_000_000
WEEK_S = 7 * 86400
MEASURE = """
import json, sys
from core.toy import ToyPhysics, spec
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.controller import Controller
from throttllem.core.options import ControllerOptions
from throttllem.core.types import Request, Slo
from throttllem.sim import samples
from throttllem.sim.driver import Machine, Simulation
from throttllem.sim.recorder import Recorder
from throttllem.sim.traces.trace import load_trace

def peak_mb():
    # Not ru_maxrss: a process begins with that of the one that started it.
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000

trace = load_trace(sys.argv[1]).scaled(peak_rps=5.0)
rows = sum(block.arrival_s.size for block in trace.blocks())
read_mb = peak_mb()
samples.MOST_VALUES = 4096
one = spec(tp=1, kv_blocks=400)
options = ControllerOptions(throttle=ThrottleOptions(policy=ClockPolicy.TOP), slo_aware=False, specs={1: one})
machine = Machine(specs={1: one}, physics={1: ToyPhysics(spec=one)}, switch_latency_s=0.0, startup_w=0.0, gpus=1)
recorder = Recorder(bin_s=1000.0)
open_at_most, marks = 0, []

def requests(count):
    for block in trace.blocks():
        for at_s in block.arrival_s.tolist():
            if not count:
                return
            count -= 1
            yield Request(id=count, arrival_s=at_s, prompt_tokens=9, max_tokens=4, output_tokens=4, slo=Slo())

def watch(arrived):
    global open_at_most
    open_at_most = max(open_at_most, len(recorder.lives))
    if arrived % 8192 == 0:
        marks.append(peak_mb())

Simulation(Controller(options), machine, recorder, seed=1).run(requests(int(sys.argv[2])), 1, watch)
print(json.dumps({"rows": rows, "read_mb": read_mb, "open": open_at_most, "marks_mb": marks}))
"""


@pytest.fixture(scope="module")
def week(tmp_path_factory):
    path = tmp_path_factory.mktemp("week") / "week.csv.gz"
    rng = np.random.default_rng(1)
    at_ns = (np.cumsum(rng.exponential(WEEK_S / ROWS, ROWS)) * 1e9).astype(np.int64) + 1_715_299_200 * 10**9
    frame = pl.LazyFrame(
        {
            "TIMESTAMP": pl.Series(at_ns).cast(pl.Datetime("ns")),
            "ContextTokens": rng.integers(1, 3000, ROWS),
            "GeneratedTokens": rng.integers(0, 500, ROWS),
        }
    )
    frame.with_columns(pl.col("TIMESTAMP").dt.strftime("%Y-%m-%d %H:%M:%S%.6f+00:00")).sink_csv(
        path, compression="gzip"
    )
    return path


def test_five_million_rows_are_read_and_simulated_in_bounded_memory(week):
    command = [sys.executable, "-c", MEASURE, str(week), "60000"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": "tests", "POLARS_MAX_THREADS": "1"},
        timeout=600,
    )
    found = json.loads(done.stdout)
    assert 0.99 * ROWS < found["rows"] < ROWS
    # The whole trace as arrays would be 120 MB, and each request that is kept about 1 kB more.
    assert found["read_mb"] < 800
    assert found["open"] < 500
    assert found["marks_mb"][-1] - found["marks_mb"][1] < 40
