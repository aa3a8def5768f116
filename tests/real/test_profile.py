"""`throttllem profile --url` on a real vLLM, with the plug-in's steps and without: `make test-real` runs this."""

import polars as pl
import pytest

from tests.real.vllm import ENVIRONMENT
from throttllem.profiling.profile import read_profile
from throttllem.profiling.storage import load_table
from tools.testbed.engines.vllm import FLAGS, vllm
from tools.testbed.gateway import throttllem

pytestmark = pytest.mark.real
SHORTEST = {1: 0, 64: 2}
"""Points by batch: the corners come first."""


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    flags = (*FLAGS, "--enable-logging-iteration-details")
    with vllm(ENVIRONMENT, tmp_path_factory.mktemp("vllm"), model=model, flags=flags, report=print) as there:
        yield there


def pace(frame, batch):
    """Median seconds of a step of short contexts: the first point of a batch has the shortest ones."""
    rows = frame.filter((pl.col("batch") == batch) & (pl.col("prompts") == 0))
    return rows.filter(pl.col("point") == SHORTEST[batch])["seconds"].median()


def test_both_ways_to_a_table(server, tmp_path):
    frames = {}
    for name, more in (("steps", ["--stats", server.stats]), ("streams", [])):
        profile = tmp_path / f"{name}.csv"
        printed = throttllem("profile", profile, "--url", server.url, *more, "--points", "10")
        assert "watts modelled" in printed
        frames[name] = read_profile(profile)
        # A tiny model under the name of a large one is faster than memory bandwidth allows.
        throttllem("train", profile, "--out", tmp_path / name, "--accept")
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
