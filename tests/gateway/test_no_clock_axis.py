"""A table whose clock axis was not measured: no clock of real GPUs is chosen with it, and none below the maximum."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest
from command import run
from profiling.live.testbed import engine_and_gpu, modelled, virtually

from gateway.test_build import A100, trained
from gateway.test_check import found, text_of
from gateway.test_hardware_run import machine  # noqa: F401 (a fixture)
from throttllem.config import ClockOptions, EngineEntry, Options
from throttllem.core.types import Slo
from throttllem.gateway.build import build_gateway
from throttllem.gpu.device import Reading
from throttllem.profiling.live.plan import LivePlan
from throttllem.profiling.live.run import profile_live
from throttllem.profiling.storage import load_table, save_table

URL = "http://127.0.0.1:9"


def without_axis(folder, clocks=A100):
    """A folder with a table as `train` writes it of a profile without --gpus."""
    trained(folder, clocks)
    file = folder / "table-tp1.npz"
    table = load_table(file)
    flat = np.repeat(table.seconds[:, -1:], len(clocks), axis=1)
    save_table(dataclasses.replace(table, seconds=flat, clocks_measured=False), file)
    return folder


def built(tmp_path, *, gpus=None, mode="dry-run", policy="least-energy", clocks=A100):
    entry = EngineEntry(kind="openai", url=URL, gpus=gpus, tables=without_axis(tmp_path, clocks))
    options = Options(
        engines=(entry,), clocks=ClockOptions(mode=mode), policy=policy, state_dir=tmp_path / "state", slo=Slo(e2e_s=30)
    )
    return build_gateway(options, tmp_path / "cache", version="1", now=time.monotonic, learn=False)


@pytest.mark.parametrize("mode", ["on", "dry-run"])
def test_real_clocks_are_an_error(tmp_path, mode):
    with pytest.raises(ValueError, match="clock axis of this table was not measured") as raised:
        built(tmp_path, gpus=("0",), mode=mode)
    for part in (
        str(tmp_path / "table-tp1.npz"),
        f"clocks.mode = '{mode}'",
        f"throttllem profile PROFILE --url {URL} --gpus 0 --clocks ",
        "throttllem train",
        "--clocks off",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize("mode", ["on", "dry-run"])
def test_check_marks_it(tmp_path, mode):
    entry = EngineEntry(kind="openai", url=URL, gpus=("0",), tables=without_axis(tmp_path))
    (fatal,) = [each for each in found(tmp_path, engines=(entry,), clocks=ClockOptions(mode=mode)) if each.fatal]
    assert fatal.mark == "!!"
    assert "clock axis of this table was not measured" in fatal.text


@pytest.mark.parametrize(("gpus", "mode"), [(None, "dry-run"), (("0",), "off")])
@pytest.mark.parametrize("policy", ["least-energy", "throttllem"])
@pytest.mark.parametrize("clocks", [A100, (900,)])
def test_without_real_clocks_it_has_only_the_maximum_clock_and_no_estimate(tmp_path, gpus, mode, policy, clocks):
    (served,) = built(tmp_path, gpus=gpus, mode=mode, policy=policy, clocks=clocks).models.served
    table, (backend,) = served.loop.controller.options.tables[1], served.loop.backends
    assert table.clocks_mhz == (1410,)
    assert backend.accounting.at_maximum.table is table
    backend.accounting.gpu = SimpleNamespace(read=lambda: Reading(clock_mhz=900, watts=1.0, energy_j=5.0))
    energy = backend.accounting.energy()
    assert (energy.top_j, energy.advised_j, energy.saved, energy.would_save) == (None, None, None, None)


def test_check_shows_that_the_clock_stays_at_its_maximum(tmp_path):
    entry = EngineEntry(kind="simulated", tables=without_axis(tmp_path))
    findings = found(tmp_path, engines=(entry,))
    assert not any(each.fatal for each in findings)
    assert "would keep to the top clock of a simulated a100-40gb-sxm" in text_of(findings)
    assert "-- engine simulated-llama-3-8b-tp1: the clock axis of its table was not measured" in text_of(findings)


def test_the_commands_in_the_order_of_the_readme(tmp_path, monkeypatch, capsys, machine):  # noqa: F811
    """`profile` without --gpus, `train`, `serve --gpus 0`: an error, and the GPU is left as it is."""

    async def profiled():
        engine, gpu = engine_and_gpu(gpu="a100-40gb-sxm", model="llama-3-8b")
        device = modelled(gpu, (210, 705, 1410))
        return await profile_live(engine, device, LivePlan(points=24, steps=6, bursts=4), tmp_path / "engine.parquet")

    virtually(profiled())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THROTTLLEM_STATE_DIR", str(tmp_path / "state"))
    assert run(monkeypatch, "train", "engine.parquet", "--out", "engine") == 0
    assert "clock axis was not measured" in " ".join(capsys.readouterr().out.split())
    serve = ["serve", "--engine", URL, "--tables", "engine", "--port", "0"]
    for more in (["--gpus", "0"], ["--gpus", "0", "--clocks", "on"]):
        assert run(monkeypatch, *serve, *more, "--check") == 2
        assert "!! engine/table-tp1.npz: the clock axis of this table was not measured" in capsys.readouterr().out
        assert run(monkeypatch, *serve, *more) == 2
        assert "clock axis of this table was not measured" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, *serve, "--gpus", "0", "--clocks", "off", "--check") == 1  # no engine is there
    assert run(monkeypatch, *serve, "--check") == 1
    assert (machine.gpus[0].lock, machine.gpus[0].attempted) == (None, 0)
