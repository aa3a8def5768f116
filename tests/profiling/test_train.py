from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from throttllem.core.forecast.performance_table import Hull, PerformanceTable
from throttllem.profiling.bake import bake
from throttllem.profiling.train import Trained, TrainSettings, train

from .analytic import profile, spec
from .conftest import SMALL

AXES = {"prefill": 0, "batch": 1, "kv": 2, "clock": 3}


def grid(table: PerformanceTable, values: np.ndarray) -> np.ndarray:
    bins = [int(getattr(table, name)[-1]) + 1 for name in ("prefill_bin", "batch_bin", "kv_bin")]
    return values.reshape(*bins, len(table.clocks_mhz)).astype(np.float64)


def test_close_to_the_engine_without_noise(trained: Trained) -> None:
    truth = profile(rows=3000, seed=9, noise_time=0.0, noise_power=0.0)
    seconds, watts = trained.predict(truth)
    assert np.abs(seconds / truth["seconds"].to_numpy() - 1).mean() < 0.05
    assert np.abs(watts / truth["watts"].to_numpy() - 1).mean() < 0.02


def test_same_profile_same_trees(measured: pl.DataFrame, trained: Trained) -> None:
    again = train(measured, SMALL)
    assert again.seconds.model_to_string() == trained.seconds.model_to_string()
    assert again.watts.model_to_string() == trained.watts.model_to_string()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("axis", "sign"), [("prefill", 1), ("kv", 1), ("clock", -1)])
def test_seconds_are_monotone(tables: dict[int, PerformanceTable], tp: int, axis: str, sign: int) -> None:
    seconds = grid(tables[tp], tables[tp].seconds)
    steps = sign * np.diff(seconds, axis=AXES[axis])
    # A float32 is good to 6e-8.
    assert steps.min() >= -1e-7 * seconds.max()
    assert steps.max() > 0


@pytest.mark.parametrize("tp", [1, 2])
def test_watts_rise_with_the_clock(tables: dict[int, PerformanceTable], tp: int) -> None:
    watts = grid(tables[tp], tables[tp].watts)
    assert np.diff(watts, axis=3).min() >= -1e-7 * watts.max()


def test_thresholds_are_bounded(tables: dict[int, PerformanceTable]) -> None:
    for table in tables.values():
        assert table.batch_bin[-1] < SMALL.batch_bins
        assert table.kv_bin[-1] < SMALL.kv_bins
        assert table.prefill_bin[-1] < SMALL.prefill_bins


def test_hulls_are_what_was_measured(trained: Trained) -> None:
    assert trained.hulls == {tp: Hull(max_batch=32, max_kv_blocks=300 * tp, max_prefill_tokens=2048) for tp in (1, 2)}


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (lambda frame: frame, {1, 2}),
        (lambda frame: frame.with_columns(any_clock=pl.lit(0)), {1, 2}),
        (lambda frame: frame.with_columns(any_clock=pl.lit(1)), set()),
        (lambda frame: frame.with_columns(any_clock=(pl.col("tp") == 2).cast(pl.Int64)), {1}),
        (lambda frame: frame.filter((pl.col("tp") == 2) | (pl.col("clock_mhz") == 1410)), {2}),
    ],
)
def test_sizes_whose_clock_axis_was_measured(
    measured: pl.DataFrame, rows: Callable[[pl.DataFrame], pl.DataFrame], sizes: set[int]
) -> None:
    quick = TrainSettings(rounds=1, leaves=2)
    found = train(rows(measured), quick)
    assert found.clocks_measured == sizes
    assert bake(found, spec(1)).clocks_measured is (1 in sizes)


def test_too_little_to_learn_from(measured: pl.DataFrame) -> None:
    with pytest.raises(ValueError, match="a profile of 99 rows"):
        train(measured.head(99))
