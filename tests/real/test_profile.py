"""`throttllem profile --url` on a real vLLM, with the plug-in's steps and without: `make test-real` runs this."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from throttllem.profiling.profile import read_profile
from throttllem.profiling.storage import load_table
from tools.testbed.engines.vllm import FLAGS, tiny_model, vllm_server

pytestmark = pytest.mark.real
ENVIRONMENT = Path(__file__).parents[2] / ".engines/vllm"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not ENVIRONMENT.exists():
        pytest.skip("no vLLM in .engines: `make engines` installs it")
    folder = tmp_path_factory.mktemp("vllm")
    model = tiny_model(ENVIRONMENT, folder / "tiny")
    address = str(folder / "steps.sock")
    flags = (*FLAGS, "--enable-logging-iteration-details")
    with vllm_server(
        ENVIRONMENT, model, folder / "vllm.log", flags=flags, environment={"THROTTLLEM_STATS": address}, say=print
    ) as there:
        yield there, address


def throttllem(server, folder, *arguments):
    command = [str(Path(sys.executable).with_name("throttllem")), *arguments]
    ended = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, server.cores),
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def pace(frame, batch):
    """Median seconds of a step of short contexts."""
    rows = frame.filter((pl.col("batch") == batch) & (pl.col("prompts") == 0))
    return rows.filter(pl.col("kv_blocks") <= 2 * batch)["seconds"].median()


def test_both_ways_to_a_table(server, tmp_path):
    there, address = server
    frames = {}
    for name, more in (("steps", ["--stats", address]), ("streams", [])):
        said = throttllem(
            there, tmp_path, "profile", f"{name}.csv", "--url", there.url, *more, "--points", "10", "--seconds", "200"
        )
        assert "watts modelled" in said
        frames[name] = read_profile(tmp_path / f"{name}.csv")
        throttllem(there, tmp_path, "train", f"{name}.csv", "--out", name)
        table = load_table(tmp_path / name / "table-tp1.npz")
        assert table.batch_bin.size == 65
        assert table.clocks_mhz[-1] == 1410
        assert table.hull.max_batch == 64
    assert "steps" in set(frames["steps"]["seconds_by"])
    assert set(frames["streams"]["seconds_by"]) == {"streams"}
    # vLLM computes what it is sent: no prompt is found in its prefix cache.
    assert frames["steps"]["prefill_tokens"].max() >= 2000
    for batch in (1, 64):
        # The engine's own seconds are without the time between two steps; other work may share the cores.
        assert 0.3 < pace(frames["steps"], batch) / pace(frames["streams"], batch) < 2
