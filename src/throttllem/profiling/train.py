"""Boosted trees of seconds and watts, over all sizes of one engine at once.

Knows nothing of tables (`bake.py`) nor of files.
"""

# The choices (measured in docs/profile-format.md).
#
# Leaves are constant, so that the trees can be tabulated; a bounded number of distinct thresholds bounds the table.
#
# Targets: the square root of seconds, weighted so that relative errors count alike, and the logarithm of watts.
# Monotone constraints hold where physics is monotone: more KV, more prompt tokens or a lower clock never save time, and
# a higher clock never lowers watts. Batch is free: the same KV in fewer, longer requests may take longer, because
# attention without grouped heads reads a long context one head at a time (A100). A monotone tree cannot correct an
# overshoot of an earlier one, so the target must be close to a sum of the effects of load and clock. Seconds' root is;
# their logarithm is not.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
import polars as pl

from throttllem.core.forecast.performance_table import Hull
from throttllem.core.forecast.switch_latency import ProfiledSwitches
from throttllem.profiling.profile import switches_of

FEATURES = ("tp", "batch", "kv_blocks", "clock_mhz", "prefill_tokens")
SECONDS_DIRECTION = (0, 0, 1, -1, 1)
# KV reads stall arithmetic: watts may fall or rise with them, and with the batch.
WATTS_DIRECTION = (0, 0, 0, 1, 0)
FEWEST_ROWS = 100
ROWS_PER_LEAF_ROW = 100
"""A leaf needs one row more for each 100 rows of the profile, up to the setting."""
KV = FEATURES.index("kv_blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Hyper-parameters. `..._bins` bound the distinct thresholds of a feature, and so the cells of the table."""

    rounds: int = 200
    leaves: int = 255
    learning_rate: float = 0.05
    min_rows_in_leaf: int = 10
    batch_bins: int = 20
    kv_bins: int = 32
    clock_bins: int = 255
    prefill_bins: int = 32
    threads: int = 1
    """The trees are the same with more. On shared cores LightGBM's threads wait for each other in busy loops: 4 s of
    training took 100 s with two threads on two busy cores."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Two boosters (square root of seconds, natural logarithm of watts; features as in FEATURES) and their profile.

    `hulls`: the profiled box of each tensor parallel degree; `clocks_measured`: those whose clock axis was measured;
    `switches`: what switches of their clocks took.
    """

    seconds: lightgbm.Booster
    watts: lightgbm.Booster
    gpu: str
    model: str
    block_tokens: int
    hulls: dict[int, Hull]
    clocks_measured: frozenset[int]
    switches: dict[int, tuple[ProfiledSwitches, ...]]

    def predict(self, profile: pl.DataFrame) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Seconds and watts of each row, by the trees themselves."""
        points = matrix(profile)
        return np.square(self.seconds.predict(points)), np.exp(self.watts.predict(points))


def train(profile: pl.DataFrame, settings: TrainSettings | None = None) -> Trained:
    """Train on a checked profile of one GPU and model. Same profile and settings, same trees."""
    if measured_rows(profile) < FEWEST_ROWS:
        raise ValueError(f"a profile of {measured_rows(profile)} rows: training takes at least {FEWEST_ROWS}")
    settings = settings or settings_for(profile)
    points = matrix(profile)
    points[:, KV] = _snapped(points[:, KV], settings.kv_bins)
    seconds = profile["seconds"].to_numpy()
    first = profile.row(0, named=True)
    return Trained(
        # Relative errors of a root weigh alike when its squares are weighted by 1 / root^2.
        seconds=_fit(points, np.sqrt(seconds), SECONDS_DIRECTION, settings, weight=seconds.mean() / seconds),
        watts=_fit(points, np.log(profile["watts"].to_numpy()), WATTS_DIRECTION, settings),
        gpu=first["gpu"],
        model=first["model"],
        block_tokens=first["block_tokens"],
        hulls=_hulls(profile),
        clocks_measured=_clocks_measured(profile),
        switches={tp: switches_of(profile, tp) for tp in profile["tp"].unique().to_list()},
    )


def settings_for(profile: pl.DataFrame, of: TrainSettings | None = None) -> TrainSettings:
    """The settings (by default the standard ones), with smaller leaves for a profile of few measured rows."""
    settings = of or TrainSettings()
    rows = measured_rows(profile)
    least = min(settings.min_rows_in_leaf, max(2, rows // ROWS_PER_LEAF_ROW))
    return replace(settings, min_rows_in_leaf=least * profile.height // rows)


def measured_rows(profile: pl.DataFrame) -> int:
    """Number of rows; a measurement that stands for several clocks counts once."""
    return profile.height // profile["clock_mhz"].n_unique() if repeated(profile) else profile.height


def repeated(profile: pl.DataFrame) -> bool:
    """Whether every row's seconds were measured once, and stand for all clocks."""
    return "any_clock" in profile.columns and bool((profile["any_clock"] == 1).all())


def matrix(profile: pl.DataFrame) -> npt.NDArray[np.float64]:
    """The features of each row, shape (rows, 5)."""
    return profile.select(pl.col(FEATURES).cast(pl.Float64)).to_numpy()


def _fit(
    points: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
    direction: tuple[int, ...],
    settings: TrainSettings,
    weight: npt.NDArray[np.float64] | None = None,
) -> lightgbm.Booster:
    parameters: dict[str, Any] = {
        "objective": "regression",
        "num_leaves": settings.leaves,
        "learning_rate": settings.learning_rate,
        "min_data_in_leaf": settings.min_rows_in_leaf,
        "monotone_constraints": list(direction),
        # The cheaper methods forbid too many splits: the error in seconds nearly doubles (docs/profile-format.md).
        "monotone_constraints_method": "advanced",
        "max_bin_by_feature": [
            255,
            settings.batch_bins,
            settings.kv_bins + 1,
            settings.clock_bins,
            settings.prefill_bins,
        ],
        "min_data_in_bin": 1,
        # Bins from all rows, not from a sample.
        "bin_construct_sample_cnt": points.shape[0],
        "seed": settings.seed,
        "num_threads": settings.threads,
        "deterministic": True,
        "force_col_wise": True,
        "verbosity": -1,
    }
    data = lightgbm.Dataset(points, target, weight=weight, feature_name=list(FEATURES), params=parameters)
    return lightgbm.train(parameters, data, num_boost_round=settings.rounds)


def _snapped(values: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.float64]:
    """Each value moved to the nearest of `bins` points, even in log(value + a quarter of the largest).

    LightGBM's own thresholds are quantiles, and only large engines reach a large KV use, so it would have the fewest.
    Thresholds between these points lie midway, so values that were not moved fall on the same side.
    """
    low, high = values.min(), values.max()
    points = np.unique(np.round(np.geomspace(low + high / 4, high * 1.25, bins) - high / 4))
    midway = (points[1:] + points[:-1]) / 2
    snapped: npt.NDArray[np.float64] = points[np.searchsorted(midway, values)]
    return snapped


def _clocks_measured(profile: pl.DataFrame) -> frozenset[int]:
    """Sizes with two clocks or more, all of whose rows were measured at their own clock."""
    repeats = pl.col("any_clock").max() if "any_clock" in profile.columns else pl.lit(0)
    sizes = profile.group_by("tp").agg(clocks=pl.col("clock_mhz").n_unique(), repeats=repeats)
    return frozenset(sizes.filter((pl.col("clocks") > 1) & (pl.col("repeats") == 0))["tp"].to_list())


def _hulls(profile: pl.DataFrame) -> dict[int, Hull]:
    boxes = profile.group_by("tp").agg(
        max_batch=pl.col("batch").max(),
        max_kv_blocks=pl.col("kv_blocks").max(),
        max_prefill_tokens=pl.col("prefill_tokens").max(),
    )
    return {box.pop("tp"): Hull(**box) for box in boxes.sort("tp").to_dicts()}
