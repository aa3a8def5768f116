from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from throttllem.core.forecast.performance_table import Calibrated, PerformanceTable, TableVerdict
from throttllem.core.forecast.switch_latency import ProfiledSwitches
from throttllem.profiling.storage import ARRAYS, TableFileError, load_table, save_table


def test_saved_and_loaded_again(tmp_path: Path, tables: dict[int, PerformanceTable]) -> None:
    path = tmp_path / "tp2.npz"
    save_table(tables[2], path)
    again = load_table(path)
    for name in ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(tables[2], name))
        assert getattr(again, name).dtype == getattr(tables[2], name).dtype
    assert (again.hull, again.clocks_mhz) == (tables[2].hull, tables[2].clocks_mhz)
    assert again.at(1410, 8, 80, 0) == tables[2].at(1410, 8, 80, 0)
    assert [item.name for item in tmp_path.iterdir()] == ["tp2.npz"]


@pytest.mark.parametrize("mark", [True, False])
def test_the_mark_of_a_measured_clock_axis_is_stored(
    tmp_path: Path, tables: dict[int, PerformanceTable], mark: bool
) -> None:
    path = tmp_path / "table.npz"
    save_table(replace(tables[1], clocks_measured=mark), path)
    assert load_table(path).clocks_measured is mark


@pytest.mark.parametrize(
    "verdict", [None, TableVerdict(faults=("a", "b"), accepted=True, seconds_error=0.1), TableVerdict(watts_error=0.2)]
)
def test_the_verdict_is_stored(
    tmp_path: Path, tables: dict[int, PerformanceTable], verdict: TableVerdict | None
) -> None:
    path = tmp_path / "table.npz"
    save_table(replace(tables[1], verdict=verdict), path)
    assert load_table(path).verdict == verdict


def test_the_basis_of_a_calibrated_table_is_stored(tmp_path: Path, tables: dict[int, PerformanceTable]) -> None:
    path, basis = tmp_path / "table.npz", Calibrated(clocks_mhz=(495, 1410), seconds_error=0.04, watts_error=0.1)
    save_table(replace(tables[1], calibrated=basis), path)
    assert load_table(path).calibrated == basis
    save_table(tables[1], path)
    assert load_table(path).calibrated is None


def test_what_switches_took_is_stored_and_checked(tmp_path: Path, tables: dict[int, PerformanceTable]) -> None:
    path = tmp_path / "table.npz"
    switches = (ProfiledSwitches(mhz=495, count=3, within_s=0.2), ProfiledSwitches(mhz=1410, count=20, within_s=0.01))
    save_table(replace(tables[1], switches=switches), path)
    assert load_table(path).switches == switches
    for name, value in (("switch_counts", [0, 20]), ("switch_within_s", [0.2, np.nan]), ("switch_clocks_mhz", [495])):
        with np.load(path) as file:
            parts = dict(file)
        np.savez(tmp_path / "damaged.npz", **(parts | {name: np.array(value)}))
        with pytest.raises(TableFileError, match=r"damaged\.npz: not a performance table, or damaged"):
            load_table(tmp_path / "damaged.npz")


def as_version_2(path: Path) -> None:
    """The file as builds before version 3 wrote it, without the mark."""
    with np.load(path) as file:
        parts = dict(file)
    parts.pop("clocks_measured")
    parts.pop("verdict")
    np.savez(path, **(parts | {"version": np.array(2)}))


def test_an_old_table_shows_whether_its_clock_axis_was_measured(
    tmp_path: Path, tables: dict[int, PerformanceTable]
) -> None:
    path, table = tmp_path / "table.npz", tables[1]
    flat = np.repeat(table.seconds[:, -1:], len(table.clocks_mhz), axis=1)
    alone = {"clocks_mhz": (1410,), "seconds": table.seconds[:, -1:], "watts": table.watts[:, -1:]}
    for one, measured in ((table, True), (replace(table, seconds=flat), False), (replace(table, **alone), False)):
        save_table(one, path)
        as_version_2(path)
        assert load_table(path).clocks_measured is measured


@pytest.fixture
def saved(tmp_path: Path, tables: dict[int, PerformanceTable]) -> Path:
    path = tmp_path / "table.npz"
    save_table(tables[1], path)
    return path


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_file_cut_short(saved: Path, keep: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(TableFileError, match=r"table.npz: not a performance table"):
        load_table(saved)


def test_a_damaged_file(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    saved.write_bytes(content)
    with pytest.raises(TableFileError, match=r"table.npz: not a performance table"):
        load_table(saved)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, a=np.arange(3))
    with pytest.raises(TableFileError, match=r"other.npz: not a performance table of throttllem"):
        load_table(path)
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(TableFileError, match=r"one.npy: not a performance table"):
        load_table(tmp_path / "one.npy")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("version", np.array(99), "table version 99, this is version 4"),
        ("hull", np.array([1, 2]), "damaged"),
        ("watts", np.ones((3, 17), dtype=np.float32), "watts has the shape"),
        ("seconds", np.ones((3, 17)), "seconds holds float64, not float32"),
        ("clocks_mhz", None, "damaged"),
        ("clocks_measured", None, "damaged"),
        ("verdict", None, "damaged"),
        ("verdict", np.array('{"faults": [], "wings": 2}'), "damaged"),
    ],
)
def test_parts_that_are_wrong(saved: Path, part: str, value: np.ndarray | None, message: str) -> None:
    with np.load(saved) as file:
        parts = dict(file)
    parts.pop(part)
    np.savez(saved, **parts, **({} if value is None else {part: value}))
    with pytest.raises(TableFileError, match=message):
        load_table(saved)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(TableFileError, match="no such file"):
        load_table(tmp_path / "absent.npz")
