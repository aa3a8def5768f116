from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from throttllem.profiling.measure import Iterates, ProfilePlan, batch_sizes, profile_engine
from throttllem.profiling.profile import COLUMNS, OPTIONAL

from .analytic import AnalyticEngine, profile, spec


class Recorder:
    """Records its arguments; every iteration takes a second."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int, int, int, float]] = []

    def iteration(self, *asked: float) -> tuple[float, float]:
        self.asked.append(asked)
        return 1.0, 100.0


def test_columns_are_those_of_the_format(measured: pl.DataFrame) -> None:
    assert measured.columns == [column.name for column in (*COLUMNS, *OPTIONAL)]
    assert measured["tp"].unique().sort().to_list() == [1, 2]


def test_same_seed_same_rows() -> None:
    again = {"rows": 500, "sizes": (2,)}
    assert profile(**again, seed=3).equals(profile(**again, seed=3))
    assert not profile(**again, seed=3).equals(profile(**again, seed=4))


def test_rows_stay_within_the_engine(measured: pl.DataFrame) -> None:
    for tp in (1, 2):
        rows, limits = measured.filter(pl.col("tp") == tp), spec(tp)
        assert rows["batch"].min() == 1
        assert rows["batch"].max() == limits.max_batch
        assert rows["kv_blocks"].max() == limits.kv_blocks
        assert rows["prefill_tokens"].max() == limits.prefill_budget_tokens
        assert rows["clock_mhz"].unique().sort().to_list() == list(limits.clocks_mhz)
        assert (rows["kv_blocks"] >= rows["batch"]).all()
        assert (rows["kv_blocks"] * limits.block_tokens >= rows["prefill_tokens"]).all()
        assert (rows["kv_blocks"] <= rows["batch"] * (limits.max_context_tokens // limits.block_tokens)).all()


def test_clocks_are_dealt_evenly(measured: pl.DataFrame) -> None:
    counts = measured["clock_mhz"].value_counts()["count"]
    assert counts.max() < 1.25 * counts.min()


def test_measured_iterations_are_plausible() -> None:
    recorder = Recorder()
    engine: Iterates = recorder
    limits = spec(1)
    frame = profile_engine(engine, limits, ProfilePlan(rows=2000))
    asked = np.array(recorder.asked)
    decode, kv_tokens, prefill, pairs = asked[:, 1:].T
    prompts = frame["batch"].to_numpy() - decode
    assert ((prompts > 0) == (prefill > 0)).all()
    assert (decode + prefill <= limits.prefill_budget_tokens).all()
    assert (kv_tokens >= decode).all()
    assert ((kv_tokens > 0) == (decode > 0)).all()
    # n prompts of t tokens in all have from t^2/2n (equal ones) to t^2/2 pairs.
    some = prompts > 0
    assert (pairs[some] <= prefill[some] ** 2 / 2).all()
    assert (pairs[some] >= prefill[some] ** 2 / 2 / prompts[some] - 1e-6).all()
    assert 0.3 < some.mean() < 0.5


def test_noise_has_the_given_size() -> None:
    exact = profile(rows=4000, sizes=(1,), noise_time=0.0, noise_power=0.0)
    noisy = profile(rows=4000, sizes=(1,), noise_time=0.02, noise_power=0.03)
    assert exact.drop("seconds", "watts").equals(noisy.drop("seconds", "watts"))
    for column, size in (("seconds", 0.02), ("watts", 0.03)):
        scatter = np.log(noisy[column].to_numpy() / exact[column].to_numpy())
        assert scatter.std() == pytest.approx(size, rel=0.1)
        assert abs(scatter.mean()) < size / 10


def test_without_noise_the_figures_are_the_engines() -> None:
    row = profile(rows=500, sizes=(1,), noise_time=0.0, noise_power=0.0).filter(pl.col("prefill_tokens") == 0)[7]
    batch, blocks, clock = row["batch"][0], row["kv_blocks"][0], row["clock_mhz"][0]
    tokens = blocks * 16 - batch * 15 // 2
    assert (row["seconds"][0], row["watts"][0]) == AnalyticEngine(1).iteration(clock, batch, tokens, 0, 0.0)


def test_batch_sizes_are_close_together() -> None:
    sizes = batch_sizes(256)
    assert sizes[:6] == [1, 2, 3, 4, 5, 6]
    assert sizes[-1] == 256
    assert all(b - a == 1 or b / a <= 1.2 for a, b in pairwise(sizes))
    assert batch_sizes(1) == [1]


def test_a_cache_smaller_than_the_batch() -> None:
    frame = profile_engine(AnalyticEngine(1), spec(1, kv_blocks=5), ProfilePlan(rows=500))
    assert frame["batch"].max() == 5
    assert frame["kv_blocks"].max() == 5


def test_progress_is_reported() -> None:
    reports: list[tuple[int, int]] = []
    frame = profile_engine(AnalyticEngine(1), spec(1), ProfilePlan(rows=2500), lambda *step: reports.append(step))
    assert reports[0] == (0, frame.height)
    assert reports[-1] == (frame.height, frame.height)
    assert reports == sorted(reports)


@pytest.mark.parametrize("changes", [{"rows": 0}, {"prefill_share": 1.5}, {"noise_time": -0.1}, {"noise_power": 1.0}])
def test_a_plan_that_makes_no_sense(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        ProfilePlan(**changes)
