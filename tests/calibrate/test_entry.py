"""The file that calibrate writes: read back as it was fitted, and honest in its comments."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from throttllem.calibrate.calibration import Calibration
from throttllem.calibrate.entry import basis, check_name, entry, write_entry
from throttllem.calibrate.errors import Errors, Score
from throttllem.calibrate.fit import Constant, Fitted, with_constants
from throttllem.physics.catalogue import Catalogue

from .synthetic import CATALOGUE, LIKE, MODEL, measure

POINTS = measure(LIKE)
HOST = Fitted(constant=Constant(path="time.host_s", start=1e-3, spread=0.7), value=2.34567891e-3, error=0.031)
NORM = Fitted(constant=Constant(path="time.gemm_norm", start=2.0, spread=0.4, low=1.0), value=1.0, error=0.3)
FITTED = Calibration(
    gpu=with_constants(LIKE, {"time.host_s": HOST.value, "time.gemm_norm": NORM.value}),
    like=LIKE.name,
    fitted=(HOST, NORM),
    scores=(Score(held_out="each clock", seconds=Errors.of([0.01, 0.05]), watts=Errors.of([0.02, -0.12])),),
    rows=160,
    rows_fitted=160,
)


def written(source: str = "fitted to p.csv, 160 rows") -> str:
    return entry(FITTED, "my-gpu", basis(POINTS, MODEL.name, source))


def test_every_shipped_gpu_comes_back_as_it_was(tmp_path):
    covered = basis(POINTS, MODEL.name, "x")
    for name, gpu in CATALOGUE.gpus.items():
        alone = Calibration(gpu=gpu, like=name, fitted=(), scores=(), rows=1, rows_fitted=1)
        write_entry(entry(alone, "mine", covered), tmp_path / "mine.toml")
        found = Catalogue.load(tmp_path / "mine.toml").gpu("mine")
        own = {"name": "mine", "like": None, "origin": found.origin, "time_basis": covered, "power_basis": covered}
        assert found == gpu.model_copy(update=own)
        if gpu.like is None:
            assert found.origin_of("time.gemm_norm") == f"{gpu.time_basis.kind} (from {name})"
        assert found.origin_of("power.limit_w") == "datasheet"


def test_the_comment_names_the_origin_of_a_constant():
    lines = {line.split(" = ")[0]: line for line in written().splitlines() if " = " in line}
    assert lines["host_s"].split() == ["host_s", "=", "0.0023457", "#", "fitted,", "+-", "3.1%"]
    assert lines["gemm_norm"].endswith(
        "# fitted, +- 30%, at the bound of its range: determined only together with others, starting from a100-40gb-sxm"
    )
    assert lines["memory_w"].endswith("# from a100-40gb-sxm: this profile does not determine it")


def test_constants_that_are_never_fitted_are_not_attributed_to_the_profile():
    h100 = CATALOGUE.gpus["h100-80gb-sxm"]
    alone = Calibration(gpu=h100, like="h100", fitted=(), scores=(), rows=1, rows_fitted=1)
    text = entry(alone, "mine", basis(POINTS, MODEL.name, "x"))
    said = {line.split(" = ")[0]: line.split("# ")[1] for line in text.splitlines() if " = " in line and "# " in line}
    for key in ("limit_w", "memory_bytes", "clock_max_mhz", "peak_flop_per_s"):
        assert said[key] == "data sheet, from h100"
    for key in ("idle_w", "bare_idle_w", "startup_s", "compute_clock_share", "compute_knee_mhz"):
        assert said[key] == "not fitted, from h100"
    for key in ("decode_split_s", "decode_walk_token_s"):
        assert said[key] == "0 in h100: that effect is not fitted"
    for key in ("static_w", "core_w", "host_s"):
        assert said[key] == "from h100: this profile does not determine it"


def test_warnings_are_in_the_file():
    suspicious = replace(FITTED, warnings=("watts of\none GPU?",))
    text = entry(suspicious, "mine", basis(POINTS, MODEL.name, "x"))
    assert "\n# WARNING: watts of?one GPU?\n" in text and "gpu" in tomllib.loads(text)


def test_errors_and_range_are_in_the_file():
    text = written()
    assert "each clock:" in text and "seconds 3.0%, 4.6%, 5.0%; watts 7.0%, 11.0%, 12.0%" in text
    covered = tomllib.loads(text)["gpu"]["my-gpu"]["power_basis"]
    assert covered["kind"] == "calibrated" and covered["source"] == "fitted to p.csv, 160 rows"
    assert (covered["clock_min_mhz"], covered["clock_max_mhz"], covered["batch_max"]) == (405, 1410, 128)
    assert (covered["tp"], covered["models"]) == ([1, 2], ["llama-3-8b"])
    held_out = next(score for score in FITTED.scores if "clock" in score.held_out)
    assert covered["median_error"] == pytest.approx(held_out.watts.median, abs=6e-4)
    assert 900 <= covered["context_max_tokens"] <= 1300


@pytest.mark.parametrize("name", ["\n[gpu.evil]", 'a"b', "\x7f\x00", "caf\udce9 \U0001f600.csv"])
def test_strange_file_names_do_no_harm(name, tmp_path):
    write_entry(written(name), tmp_path / "mine.toml")
    assert set(Catalogue.load(tmp_path / "mine.toml").gpus) == {*CATALOGUE.gpus, "my-gpu"}


@pytest.mark.parametrize("name", ["", "a b", "a.b", 'x"', "é", "a\n", "x" * 81])
def test_names_that_toml_would_quote_are_refused(name):
    with pytest.raises(ValueError, match="letters, digits"):
        check_name(name)
    assert check_name("A-1_b") == "A-1_b"


def test_a_gpu_that_cannot_be_is_never_written():
    broken = with_constants(LIKE, {"power.static_w": 500.0})
    impossible = Calibration(gpu=broken, like=LIKE.name, fitted=(), scores=(), rows=1, rows_fitted=1)
    with pytest.raises(ValueError, match=r"no possible GPU .*below power.limit_w.*--like"):
        entry(impossible, "x", basis(POINTS, MODEL.name, "x"))


def test_a_folder_is_not_overwritten(tmp_path):
    with pytest.raises(OSError, match="directory"):
        write_entry(written(), Path(tmp_path))
