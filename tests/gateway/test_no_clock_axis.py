"""A table whose clock axis was not measured: no clock of real GPUs is chosen with it, and none below the maximum."""

import dataclasses
import os
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command import run
from profiling.live.testbed import engine_and_gpu, modelled, virtually

from gateway.test_build import A100, trained
from gateway.test_check import found, text_of
from throttllem.config import ClockOptions, EngineEntry, Options
from throttllem.core.types import Slo
from throttllem.gateway.build import build_gateway
from throttllem.gpu.device import Reading
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.engine import EnginePhysics
from throttllem.profiling.live.plan import LivePlan
from throttllem.profiling.live.run import profile_live
from throttllem.profiling.storage import load_table, save_table

URL = "http://127.0.0.1:9"
REPOSITORY = Path(__file__).parents[2]


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


def commands_of(page):
    """The `throttllem` commands of a page's section on a live engine, in the page's own order, as lists of words."""
    section = (REPOSITORY / page).read_text(encoding="utf-8").partition("## Five minutes with vLLM")[2]
    lines = section.partition("\n## ")[0].splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("throttllem ")]


def test_the_commands_in_the_order_of_the_readme(tmp_path, monkeypatch, capsys, machine):
    """The README's own lines, then its guide's `--gpus 0`: an error, and the GPU is left as it is."""
    (profile, out, *options), train, serve = commands_of("README.md")
    assert (profile, train[0], serve[0]) == ("profile", "train", "serve")
    assert "--gpus" not in options
    law = EnginePhysics(Catalogue.load(None).gpu("a100-40gb-sxm"), Catalogue.load(None).model("llama-3-8b"), 1)

    async def profiled():
        engine, gpu = engine_and_gpu(law, gpu="a100-40gb-sxm", model="llama-3-8b")
        plan = LivePlan(points=20, steps=6, bursts=4)
        return await profile_live(engine, modelled(gpu, (210, 1410), law), plan, tmp_path / out)

    virtually(profiled())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THROTTLLEM_STATE_DIR", str(tmp_path / "state"))
    assert run(monkeypatch, *train) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "clock axis was not measured" in said
    assert "verdict, tp 1: sound" in said
    monkeypatch.setenv("THROTTLLEM_STATS", str(tmp_path / "steps.sock"))  # as the README's export
    nowhere = [URL if word.startswith("http://") else os.path.expandvars(word) for word in serve]
    for more in (["--gpus", "0"], ["--gpus", "0", "--clocks", "on"]):
        assert run(monkeypatch, *nowhere, "--port", "0", *more, "--check") == 2
        table = f"{train[-1]}/table-tp1.npz"
        assert f"!! {table}: the clock axis of this table was not measured" in capsys.readouterr().out
        assert run(monkeypatch, *nowhere, "--port", "0", *more) == 2
        assert "clock axis of this table was not measured" in " ".join(capsys.readouterr().err.split())
    assert (
        run(monkeypatch, *nowhere, "--port", "0", "--gpus", "0", "--clocks", "off", "--check") == 1
    )  # no engine is there
    assert run(monkeypatch, *nowhere, "--port", "0", "--check") == 1
    assert "would choose" not in capsys.readouterr().out
    assert (machine.gpus[0].lock, machine.gpus[0].attempted) == (None, 0)
