"""The command line over real HTTP: profile the gateway's simulated engine, train on it, load the table for serve."""

import statistics
import time

import polars as pl
import pytest
from command import run

from throttllem.config import EngineEntry, Options
from throttllem.gateway.build import build_gateway
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.live.plan import LivePlan
from throttllem.profiling.live.run import profile_live
from throttllem.profiling.profile import read_profile
from throttllem.profiling.storage import load_table

from .testbed import engine_and_gpu, gateway, modelled, virtually

CAPACITIES = {"max_batch": 4, "kv_blocks": 400, "block_tokens": 64, "max_context_tokens": 2048}
TOLD = [f"--capacity={name}={value}" for name, value in CAPACITIES.items()]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    with gateway(tmp_path_factory.mktemp("gateway"), max_batch=4) as url:
        yield url


@pytest.mark.slow
def test_what_is_measured_over_http_is_the_physics_behind_it(there, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "profile", "p.csv", "--url", there, *TOLD, "--points", "1", "--clocks", "1410,705") == 0
    frame = read_profile(tmp_path / "p.csv")
    assert "watts modelled" in capsys.readouterr().err
    assert close_to(frame) < 0.2
    assert set(frame["clock_mhz"]) == {705, 1410}
    assert set(frame["kv_capacity_blocks"]) == {400}
    assert not (tmp_path / "p.csv.partial").exists()


@pytest.mark.slow
def test_train_makes_a_table_of_the_engines_own_capacities(tmp_path, monkeypatch):
    """Not of those that the catalogue's engine would have; the gateway takes it for an engine like that one."""

    async def profiled():
        engine, gpu = engine_and_gpu(gpu="a100-40gb-sxm", model="llama-3-8b")
        plan = LivePlan(points=24, steps=6, bursts=4)
        return await profile_live(engine, modelled(gpu, (705, 1410)), plan, tmp_path / "p.csv")

    virtually(profiled())
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "train", "p.csv", "--out", "tables", "--accept") == 0  # faster than an A100 could be
    table = load_table(tmp_path / "tables/table-tp1.npz")
    assert (table.batch_bin.size, table.kv_bin.size, table.prefill_bin.size) == (9, 401, 513)
    assert (table.clocks_mhz[0], table.clocks_mhz[-1]) == (705, 1410)
    assert table.at(1410, 8, 300, 0)[0] > table.at(1410, 1, 2, 0)[0]
    entry = EngineEntry(kind="openai", url="http://127.0.0.1:1", tables=tmp_path / "tables")
    options = Options(engines=(entry,), state_dir=tmp_path / "state")
    assert build_gateway(options, tmp_path, version="1", now=time.monotonic).models.served


def close_to(frame):
    """The median error of seconds against the physics behind the gateway, decode rows alone."""
    known = Catalogue.load(None)
    physics = EnginePhysics(known.gpu("a100-40gb-sxm"), known.model("llama-3-8b"), 1)
    errors = []
    for row in frame.filter((pl.col("clock_mhz") == 1410) & (pl.col("prompts") == 0)).iter_rows(named=True):
        seconds, _ = physics.iteration(1410, row["batch"], row["kv_blocks"] * 64 - row["batch"] * 32, 0, 0)
        errors.append(abs(row["seconds"] / seconds - 1))
    return statistics.median(errors)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--clocks", "705"], "the top clock, 1410, must be among them"),
        (["--clocks", "fast"], "must be MHz with commas between"),
        (["--capacity", "wings=2"], "write NAME=N, as in kv_blocks=4096"),
        (["--engine-kind", "steam"], "--engine-kind: engines.0.kind = 'steam'"),
        (["--sizes", "1,2"], "one engine has one size; give --tp"),
        (["--points", "0"], "must be at least 1"),
        (["--resume"], "to continue"),
        (["--url", "http://me:pw@127.0.0.1"], "--url: engines.0.url: must hold no user and password"),
        (TOLD[:1], "does not report kv_blocks"),
    ],
)
def test_refusals(there, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    told = [] if more == TOLD[:1] else TOLD
    assert run(monkeypatch, "profile", "p.csv", "--url", there, *told, *more) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_what_the_engine_reports(tmp_path, monkeypatch, capsys):
    """It is asked before anything is measured; one that is not known must be given."""
    monkeypatch.chdir(tmp_path)
    with gateway(tmp_path / "gateway", max_batch=4, served_as="mine") as url:
        assert run(monkeypatch, "profile", "p.csv", "--url", url, *TOLD, "--points", "1") == 2
        assert "the engine serves mine, whose figures are not known: give --model" in capsys.readouterr().err


def test_a_name_that_no_profile_has_is_refused_before_anything(there, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "profile", str(tmp_path / "p.txt"), "--url", there, *TOLD) == 2
    assert "ends with .parquet or .csv" in " ".join(capsys.readouterr().err.split())
