"""A table that `train` found wanting: `on` refuses it unless it was accepted, a dry run warns, `--check` shows it."""

import contextlib
import dataclasses
import logging
import time

import pytest

from gateway.test_build import trained
from gateway.test_check import found, text_of
from throttllem.config import ClockOptions, EngineEntry, Options
from throttllem.core.forecast.performance_table import TableVerdict
from throttllem.engines.base import Connected
from throttllem.gateway.build import build_gateway
from throttllem.gateway.telemetry.status import assumptions
from throttllem.physics.catalogue import Catalogue
from throttllem.physics.model import Weights
from throttllem.profiling.storage import load_table, save_table

FAULT = "column watts looks like milliwatts"
BELOW, ACCEPTED = TableVerdict(faults=(FAULT,)), TableVerdict(faults=(FAULT,), accepted=True)
SOUND = TableVerdict(seconds_error=0.04, watts_error=0.02)


def entry(tmp_path, verdict):
    file = trained(tmp_path) / "table-tp1.npz"
    save_table(dataclasses.replace(load_table(file), verdict=verdict), file)
    return EngineEntry(kind="openai", url="http://127.0.0.1:9", gpus=("0",), tables=tmp_path)


def built(tmp_path, verdict, mode):
    options = Options(engines=(entry(tmp_path, verdict),), clocks=ClockOptions(mode=mode), state_dir=tmp_path / "state")
    return build_gateway(options, tmp_path / "cache", version="1", now=time.monotonic, learn=False)


def test_on_refuses_it_and_says_how_to_overrule(tmp_path):
    with pytest.raises(ValueError, match=f"no clock may be set by this table: {FAULT}") as raised:
        built(tmp_path, BELOW, "on")
    for part in (str(tmp_path / "table-tp1.npz"), "--accept", "--clocks dry-run"):
        assert part in str(raised.value)


@pytest.mark.parametrize(("mode", "refused"), [("on", True), ("dry-run", False), ("off", False)])
def test_a_table_of_another_kind_of_gpu_sets_no_clock(tmp_path, caplog, mode, refused):
    """H100 and H200 have the same clocks, so only the kind that the table carries tells them apart."""
    served = entry(tmp_path, SOUND)
    file = tmp_path / "table-tp1.npz"
    table = dataclasses.replace(load_table(file), gpu="h100-80gb-sxm")
    save_table(
        dataclasses.replace(table, clocks_mhz=tuple(1980 - 15 * n for n in range(len(table.clocks_mhz)))[::-1]), file
    )
    options = Options(
        engines=(dataclasses.replace(served, gpu="h200-141gb-sxm"),),
        clocks=ClockOptions(mode=mode),
        state_dir=tmp_path / "state",
    )
    text = "was learned on h100-80gb-sxm, and the engine's GPU is h200-141gb-sxm"
    if refused:
        with pytest.raises(ValueError, match=text):
            build_gateway(options, tmp_path / "cache", version="1", now=time.monotonic, learn=False)
    else:
        build_gateway(options, tmp_path / "cache", version="1", now=time.monotonic, learn=False)
        assert text in caplog.text


LLAMA = Catalogue.load().model("llama-3-8b")
A100 = Catalogue.load().gpu("a100-40gb-sxm")


@pytest.mark.parametrize(
    ("gpu", "model", "refused"),
    [
        (A100.name, LLAMA, None),
        (A100.name, LLAMA.model_copy(update={"name": "mine", "weights": Weights.INT4, "vocabulary": 128264}), None),
        (A100.name, LLAMA.model_copy(update={"layers": 28}), "was learned with llama-3-8b"),
        ("l20-48gb", LLAMA, "was learned on l20-48gb, and the engine's GPU is a100-40gb-sxm"),
    ],
)
def test_a_table_of_another_model_or_of_an_unlisted_gpu_sets_no_clock(tmp_path, gpu, model, refused):
    served = dataclasses.replace(entry(tmp_path, SOUND), model="llama-3-8b")
    file = tmp_path / "table-tp1.npz"
    save_table(dataclasses.replace(load_table(file), gpu=gpu, model=model.model_dump_json()), file)
    options = Options(engines=(served,), clocks=ClockOptions(mode="on"), state_dir=tmp_path / "state")
    with pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext():
        build_gateway(options, tmp_path / "cache", version="1", now=time.monotonic, learn=False)


@pytest.mark.parametrize(("mode", "refused"), [("on", True), ("dry-run", False)])
def test_an_engine_that_reports_another_model_is_not_taken_into_use(tmp_path, mode, refused):
    served = entry(tmp_path, SOUND)
    file = tmp_path / "table-tp1.npz"
    save_table(dataclasses.replace(load_table(file), model=LLAMA.model_dump_json()), file)
    options = Options(engines=(served,), clocks=ClockOptions(mode=mode), state_dir=tmp_path / "state")
    gateway = build_gateway(options, tmp_path / "cache", version="1", now=time.monotonic, learn=False)
    (backend,) = gateway.models.served[0].loop.backends
    spec = gateway.models.served[0].loop.controller.options.specs[1]
    other = backend.model.refused(Connected(spec=spec, models=("chat",), roots=("Qwen/Qwen3-8B",)))
    assert (other is not None and "the engine's model is qwen3-8b" in other) == refused
    for reported in (("meta-llama/Llama-3.1-8B-Instruct",), ("someone/secret-7b",)):
        assert backend.model.refused(Connected(spec=spec, models=("chat",), roots=reported)) is None


@pytest.mark.parametrize(
    ("verdict", "mode", "warned"),
    [
        (BELOW, "dry-run", True),
        (BELOW, "off", True),
        (ACCEPTED, "on", False),
        (SOUND, "on", False),
        (None, "on", False),
    ],
)
def test_what_is_served_and_what_is_warned_of(tmp_path, caplog, verdict, mode, warned):
    with caplog.at_level(logging.WARNING):
        (served,) = built(tmp_path, verdict, mode).models.served
    assert (FAULT in caplog.text) == warned
    noted = any(FAULT in note for note in assumptions(served.loop, served.loop.backends[0]))
    assert noted == (verdict in (BELOW, ACCEPTED))


@pytest.mark.parametrize(
    ("verdict", "mode", "line"),
    [
        (BELOW, "on", "!! "),
        (BELOW, "dry-run", "!! engine openai-tp1: of its table `train` found: column watts"),
        (ACCEPTED, "on", "accepted with --accept"),
        (SOUND, "on", "ok engine openai-tp1: its table is sound: held-out seconds 4.0% off, watts 2.0% off"),
        (None, "on", "-- engine openai-tp1: its table was not judged"),
    ],
)
def test_check_shows_it(tmp_path, verdict, mode, line):
    findings = found(tmp_path, engines=(entry(tmp_path, verdict),), clocks=ClockOptions(mode=mode))
    assert line in text_of(findings)
    refused = any(each.fatal and FAULT in each.text for each in findings)
    assert refused == (verdict is BELOW and mode == "on")
