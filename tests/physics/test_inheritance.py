"""Entries that are like another GPU, and the basis of each constant."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from throttllem.physics.catalogue import Catalogue, CatalogueError

CATALOGUE = Catalogue.load()
H20 = """
[gpu.h20-96gb]
like = "h100-80gb-sxm"
clock_min_mhz = 345
clock_max_mhz = 1980
clock_step_mhz = 15
memory_bytes = 102.6e9
bandwidth_bytes_per_s = 4.0e12
peak_flop_per_s = 148e12
limit_w = 500
"""
BASIS = dict.fromkeys(("operators", "clocks", "served", "run", "paper"), "calibrated")
"""By the tag in the comment of a constant, where it is not the basis itself."""


def load(tmp_path: Path, text: str) -> Catalogue:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return Catalogue.load(file)


def test_eight_lines_make_a_gpu(tmp_path: Path) -> None:
    like, gpu = CATALOGUE.gpu("h100-80gb-sxm"), load(tmp_path, H20).gpu("h20-96gb")
    assert (gpu.power.limit_w, gpu.peak_flop_per_s, gpu.peak_fp8_flop_per_s) == (
        500,
        148e12,
        pytest.approx(like.peak_fp8_flop_per_s * 148 / 989),
    )
    assert gpu.origin_of("peak_fp8_flop_per_s") == "modelled (inherited from h100-80gb-sxm)"
    older = load(tmp_path, H20 + 'compute_capability = "8.6"').gpu("h20-96gb")
    assert older.peak_fp8_flop_per_s is None
    assert gpu.power.core_w == pytest.approx(like.power.core_w * 500 / 700)
    assert gpu.time.gemm_peak_fraction == like.time.gemm_peak_fraction
    assert gpu.nvml_names == () and gpu.compute_capability is None
    for basis in (gpu.time_basis, gpu.power_basis):
        assert basis.kind == "modelled" and basis.source.startswith("inherited from h100-80gb-sxm and scaled")
    assert gpu.origin_of("power.core_w") == "modelled (inherited from h100-80gb-sxm)"
    assert gpu.origin_of("power.limit_w") == gpu.origin_of("memory_bytes") == "datasheet"


def test_knees_follow_the_clock_or_the_bandwidth_of_a_multiprocessor(tmp_path: Path) -> None:
    like = CATALOGUE.gpu("h100-80gb-sxm")
    slower = H20.replace("1980", "1755")
    gpu = load(tmp_path, slower).gpu("h20-96gb")
    assert gpu.power.knee_mhz == pytest.approx(like.power.knee_mhz * 1755 / 1980)
    assert gpu.time.memory_knee_mhz == pytest.approx(like.time.memory_knee_mhz * 1755 / 1980)
    gpu = load(tmp_path, slower + "multiprocessors = 120").gpu("h20-96gb")
    assert gpu.time.memory_knee_mhz == pytest.approx(like.time.memory_knee_mhz * (4.0 / 120) / (3.35 / 132))
    gpu = load(tmp_path, slower + "multiprocessors = 50").gpu("h20-96gb")
    assert gpu.time.memory_knee_mhz == 1755


def test_what_an_entry_has_replaces_what_it_inherits(tmp_path: Path) -> None:
    own = H20 + "idle_w = 90\n[gpu.h20-96gb.power]\ncore_w = 222.0\n[gpu.h20-96gb.origin]\nmeasured = ['power.idle_w']"
    gpu = load(tmp_path, own).gpu("h20-96gb")
    assert (gpu.power.core_w, gpu.power.idle_w) == (222.0, 90)
    assert gpu.origin_of("power.idle_w") == "measured"
    assert gpu.origin_of("power.core_w") == "modelled"
    assert gpu.origin_of("power.compute_w") == "modelled (inherited from h100-80gb-sxm)"


def test_an_entry_may_be_like_one_of_its_own_file_or_the_one_that_it_replaces(tmp_path: Path) -> None:
    other = H20.replace("h20-96gb", "other").replace('"h100-80gb-sxm"', '"h20-96gb"')
    assert load(tmp_path, other + H20).gpu("other").like == "h20-96gb"
    again = load(tmp_path, H20.replace("h20-96gb", "h100-80gb-sxm")).gpu("h100-80gb-sxm")
    assert again.power.limit_w == 500 and again.time.host_s == CATALOGUE.gpu("h100-80gb-sxm").time.host_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (H20.replace("h100-80gb", "h100"), r"like: 'h100-sxm': no GPU has that name; did you mean .*h100-80gb-sxm"),
        (H20.replace('"h100-80gb-sxm"', '"h20-96gb"'), "is like this entry itself"),
        (H20.replace("limit_w = 500", 'limit_w = "much"'), "limit_w: must be a number above 0"),
        (
            H20.replace("bandwidth_bytes_per_s = 4.0e12", "bandwidth_bytes_per_s = 0"),
            "bandwidth_bytes_per_s: 0: must be",
        ),
        (H20.replace("4.0e12", "4000"), r"bandwidth_bytes_per_s: 4000: must be in bytes/s"),
        (H20.replace("= 500", "= 500000"), r"limit_w: 500000: must be in W"),
        (H20.replace("102.6e9", "102.6"), r"memory_bytes: 102.6: must be in bytes"),
        (H20.replace("102.6e9", "true"), r"memory_bytes: must be a number or a text, not true"),
        (H20.replace("148e12", "148"), r"peak_flop_per_s: 148: must be in FLOP/s"),
        (H20.replace("1980", "99999990"), r"clock_max_mhz: 99999990: must be in MHz"),
        (H20 + "time = {gemm_kernel_s = 3.8}", r"time.gemm_kernel_s: 3.8: must be in seconds"),
        (H20.replace("= 500", "= 1" + 400 * "0"), r"limit_w: 1000+: must be"),
        (H20 + "origin = {measured = 3}", r"origin.measured: must be a list of constants"),
        (H20 + "power = 3", "power: must be a table"),
        (H20 + "colour = 1", "colour: unknown key"),
        (H20 + "idle_w = 600", "must be below power.limit_w"),
        (H20.replace("1980", "1981"), "clock_max_mhz must be"),
        (H20 + 'compute_capability = "9"', "compute_capability"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=f"mine.toml: gpu.h20-96gb.*{message}"):
        load(tmp_path, text)


def test_every_shipped_gpu_can_be_recognised() -> None:
    names = [name for gpu in CATALOGUE.gpus.values() for name in gpu.nvml_names]
    assert len(names) == len(set(names)) >= len(CATALOGUE.gpus)
    assert all(gpu.compute_capability for gpu in CATALOGUE.gpus.values())


def test_the_basis_of_every_constant_is_that_of_its_comment() -> None:
    text = resources.files("throttllem.physics").joinpath("catalogue.toml").read_text(encoding="utf-8")
    name = law = ""
    seen = 0
    for line in text.splitlines():
        if table := re.match(r"\[+(gpu|model)\.([a-z0-9-]+)(?:\.([a-z_]+))?", line):
            name, law = (table[2] if table[1] == "gpu" else ""), table[3] or ""
        constant = re.match(r"(\w+) = .*# \[(\w+)\]", line)
        if not name or not constant or law.endswith("_basis"):
            continue
        path = f"{law}.{constant[1]}" if law else constant[1]
        path = f"power.{path}" if path in ("idle_w", "bare_idle_w", "limit_w") else path
        assert CATALOGUE.gpu(name).origin_of(path) == BASIS.get(constant[2], constant[2]), f"{name}: {path}"
        seen += 1
    assert seen > 100
