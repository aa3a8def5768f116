"""From options to a gateway: what is built, and which options are errors before a port is served."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from core.toy import spec, table

from throttllem.config import EngineEntry, LengthOptions, Options, RecorderOptions
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.gateway.build import build_gateway, groups
from throttllem.profiling.storage import save_table

A100 = tuple(range(210, 1411, 15))


def built(tmp_path, *, learn=False, **options):
    whole = Options(state_dir=tmp_path / "state", **options)
    return build_gateway(whole, tmp_path / "cache", version="1", now=time.monotonic, learn=learn)


def trained(tmp_path, clocks=A100, tp=1):
    """A folder with a table of the toy engine for `clocks`."""
    some = spec(tp=tp, clocks_mhz=clocks)
    save_table(
        replace(table(some), clocks_mhz=clocks) if len(clocks) == 5 else widened(some), tmp_path / f"table-tp{tp}.npz"
    )
    return tmp_path


def widened(some):
    toy = table(spec())
    columns = [min(4, index * 5 // len(some.clocks_mhz)) for index in range(len(some.clocks_mhz))]
    return replace(toy, clocks_mhz=some.clocks_mhz, seconds=toy.seconds[:, columns], watts=toy.watts[:, columns])


def test_engines_of_one_model_serve_side_by_side_unless_the_policy_selects_a_size(tmp_path):
    def loop_of(policy, *sizes):
        scale = AutoscaleOptions(capacity_rps=dict.fromkeys(sizes, 1.0))
        gateway = built(tmp_path, policy=policy, engines=tuple(EngineEntry(tp=tp) for tp in sizes), autoscale=scale)
        return gateway.models.served[0].loop

    loop = loop_of("triton", 1, 2, 1)
    pool = loop.controller.options.pool
    assert (pool.gpus, pool.engines, pool.start_s) == (4, {1: 2, 2: 1}, math.inf)
    names = [backend.name for backend in loop.backends]
    assert names == ["simulated-llama-3-8b-tp1-1", "simulated-llama-3-8b-tp2", "simulated-llama-3-8b-tp1-2"]
    assert loop_of("triton", 2).controller.options.pool is None
    assert loop_of("triton+autoscale", 1, 2).controller.options.pool is None
    scaled = loop_of("triton+autoscale", 2, 2).controller.options.pool
    assert (scaled.gpus, scaled.engines) == (4, {2: 2})
    with pytest.raises(ValueError, match="2 of 3 have tp = 1; leave one of each size, or engines of one size"):
        loop_of("triton+autoscale", 1, 1, 2)


def test_one_model_in_two_sizes_and_another():
    entries = (
        EngineEntry(tp=2),
        EngineEntry(kind="openai", url="http://x", served_as="other"),
        EngineEntry(tp=1),
    )
    assert sorted([entry.tp for entry in group] for group in groups(entries)) == [[1], [2, 1]]


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ((), "none is configured"),
        (
            (EngineEntry(kind="openai", url="http://x"), EngineEntry(kind="openai", url="http://x", tp=2)),
            "two have url = http://x: it is one engine",
        ),
        (
            (EngineEntry(), EngineEntry(tables=Path("other"))),
            "two of model llama-3-8b with tp = 1 have different tables",
        ),
        (
            (EngineEntry(), EngineEntry(gpu="h100-80gb-sxm")),
            "two models are called llama-3-8b: give each its own served_as",
        ),
        (
            (EngineEntry(served_as="x"), EngineEntry(model="llama-2-13b", served_as="x")),
            "two models are called x",
        ),
    ],
)
def test_engines_that_cannot_be_distinguished_are_an_error(entries, text):
    with pytest.raises(ValueError, match=text):
        groups(entries)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policy": "least-enrgy"}, "did you mean 'least-energy'"),
        ({"policy": "fixed:1"}, "no clock of this GPU"),
        ({"policy": "least-energy+autoscale"}, "give two or more"),
        (
            {"policy": "triton+autoscale", "engines": (EngineEntry(tp=1), EngineEntry(tp=2))},
            r"\[autoscale.capacity_rps\] must give the requests/s that each size bears \(1, 2\)",
        ),
        ({"engines": (EngineEntry(gpu="a100"),)}, "a100-40gb-sxm"),
        ({"engines": (EngineEntry(model="llama"),)}, "llama-3-8b"),
        ({"engines": (EngineEntry(tp=3),)}, "heads"),
    ],
)
def test_impossible_options_are_named(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        built(tmp_path, **options)


def test_policies(tmp_path):
    for name, policy, aware in (
        ("triton", ClockPolicy.TOP, False),
        ("fixed:1110", ClockPolicy.FIXED, False),
        ("throttllem", ClockPolicy.THROTTLLEM, True),
        ("least-energy", ClockPolicy.LEAST_ENERGY, True),
    ):
        (served,) = built(tmp_path, policy=name).models.served
        options = served.loop.controller.options
        assert (options.throttle.policy, options.slo_aware, options.autoscale) == (policy, aware, None)
    assert not list(tmp_path.iterdir()), "building touches no file"


def test_sizes_with_autoscale(tmp_path):
    scale = AutoscaleOptions(capacity_rps={1: 2.0, 2: 5.0})
    entries = (EngineEntry(tp=2), EngineEntry(tp=1))
    gateway = built(tmp_path, policy="triton+autoscale", engines=entries, autoscale=scale)
    (served,) = gateway.models.served
    assert sorted(backend.tp for backend in served.loop.backends) == [1, 2]
    assert served.loop.controller.options.autoscale == scale


def test_tables_from_a_folder(tmp_path):
    entry = EngineEntry(kind="openai", url="http://127.0.0.1:1", tables=trained(tmp_path))
    (served,) = built(tmp_path, engines=(entry,)).models.served
    assert served.loop.controller.options.tables[1].clocks_mhz == A100
    assert served.loop.backends[0].accounting.at_maximum.table is served.loop.controller.options.tables[1]


def test_missing_tables_and_those_of_another_gpu_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"table-tp1\.npz: no such file; `throttllem train PROFILE --out "):
        built(tmp_path, engines=(EngineEntry(tables=tmp_path),))
    trained(tmp_path, clocks=(600, 800, 1000, 1200, 1401))
    with pytest.raises(ValueError, match="was learned at 1401 MHz, which a100-40gb-sxm does not have"):
        built(tmp_path, engines=(EngineEntry(tables=tmp_path),))


def test_names_that_are_no_file_names(tmp_path):
    entry = EngineEntry(kind="openai", url="http://127.0.0.1:1", served_as="org/../model")
    gateway = built(tmp_path, engines=(entry,))
    ((file, _),) = gateway.predictors
    assert file.parent == tmp_path / "state"
    assert gateway.models.names() == ("org/../model",)


def test_learned_lengths_are_restored_and_damage_is_logged(tmp_path, caplog):
    ((file, _),) = built(tmp_path).predictors
    file.parent.mkdir()
    file.write_text(json.dumps({"mark": "throttllem lengths", "lengths": 7}))
    built(tmp_path)
    assert "Learning begins again" in caplog.text


def test_without_learning_and_without_recording(tmp_path):
    gateway = built(tmp_path, length=LengthOptions(predictor="max-tokens"), recorder=RecorderOptions(enabled=False))
    assert (gateway.predictors, gateway.recorders) == ((), ())
