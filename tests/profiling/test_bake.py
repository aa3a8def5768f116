from __future__ import annotations

import dataclasses
import re
import time

import lightgbm
import numpy as np
import polars as pl
import pytest

from throttllem.core.forecast.performance_table import Hull, PerformanceTable
from throttllem.profiling.bake import bake, leaves
from throttllem.profiling.train import FEATURES, Trained

from .analytic import spec


def largest_difference(table: PerformanceTable, trained: Trained, tp: int, points: dict[str, np.ndarray]) -> float:
    """The largest relative difference between the table and the trees, over seconds and watts."""
    clock = points["clock_mhz"]
    frame = pl.DataFrame({"tp": np.full(clock.size, tp), **points})
    cells = table.cells(points["batch"], points["kv_blocks"], points["prefill_tokens"])
    column = np.searchsorted(table.clocks_mhz, clock)
    return max(
        float(np.abs(values[cells, column] / told - 1).max())
        for values, told in zip((table.seconds, table.watts), trained.predict(frame), strict=True)
    )


def random_points(tp: int, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    limits = spec(tp)
    return {
        "batch": rng.integers(0, limits.max_batch + 1, count),
        "kv_blocks": rng.integers(0, limits.kv_blocks + 1, count),
        "clock_mhz": rng.choice(np.array(limits.clocks_mhz), count),
        "prefill_tokens": rng.integers(0, limits.prefill_budget_tokens + 1, count) * rng.integers(0, 2, count),
    }


@pytest.mark.parametrize("tp", [1, 2])
def test_equals_the_trees_at_random_points(tables: dict[int, PerformanceTable], trained: Trained, tp: int) -> None:
    points = random_points(tp, 5000, np.random.default_rng(1))
    assert largest_difference(tables[tp], trained, tp, points) < 1e-6


def thresholds(trained: Trained, feature: str) -> np.ndarray:
    """Every threshold of a feature, read from LightGBM's own text form and not as `bake` reads it."""
    found: set[float] = set()
    for booster in (trained.seconds, trained.watts):
        lines = dict.fromkeys(("split_feature", "threshold"), "")
        for line in booster.model_to_string().splitlines():
            key, _, value = line.partition("=")
            lines[key] = value
            if key == "threshold":
                pairs = zip(lines["split_feature"].split(), value.split(), strict=True)
                found |= {float(threshold) for index, threshold in pairs if FEATURES[int(index)] == feature}
    return np.array(sorted(found))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("name", "last"), [("batch", 32), ("kv_blocks", 300), ("prefill_tokens", 2048)])
def test_equals_the_trees_at_and_beside_every_threshold(
    tables: dict[int, PerformanceTable], trained: Trained, tp: int, name: str, last: int
) -> None:
    edges = np.floor(thresholds(trained, name)).astype(np.int64)
    assert edges.size > 10
    largest = last * tp if name == "kv_blocks" else last
    beside = np.unique(np.clip(np.concatenate([edges - 1, edges, edges + 1]), 0, largest))
    points = random_points(tp, 50 * beside.size, np.random.default_rng(2))
    points[name] = np.repeat(beside, 50)
    assert largest_difference(tables[tp], trained, tp, points) < 1e-6


def test_thresholds_that_are_whole_numbers_split_as_the_tree_does() -> None:
    """By hand: at the threshold itself the tree goes left."""
    trained = forest([(0, 0), (1, 10), (10, 10), (11, 20), (20, 20)])
    for booster in (trained.seconds, trained.watts):
        for tree in booster.dump_model()["tree_info"]:
            assert "split_feature" in tree["tree_structure"]
    text = re.sub(r"^threshold=.*$", "threshold=10", trained.seconds.model_to_string(), flags=re.MULTILINE)
    whole = dataclasses.replace(trained, seconds=lightgbm.Booster(model_str=text))
    table = bake(whole, spec(1))
    told = [table.at(210, 1, kv, 0)[0] for kv in (0, 9, 10, 11, 12)]
    frame = pl.DataFrame({"tp": 1, "batch": 1, "kv_blocks": [0, 9, 10, 11, 12], "clock_mhz": 210, "prefill_tokens": 0})
    assert told == pytest.approx(whole.predict(frame)[0], rel=1e-6)
    assert told[2] == told[0] != told[3] == told[4]


def forest(kv_and_clock: list[tuple[int, int]]) -> Trained:
    """One split on KV blocks, in both boosters; the points matter only in that they have one."""
    kv = np.repeat([kv for kv, _ in kv_and_clock], 10).astype(float)
    points = np.zeros((kv.size, len(FEATURES)))
    points[:, FEATURES.index("kv_blocks")] = kv
    parameters = {"num_leaves": 2, "min_data_in_leaf": 1, "min_data_in_bin": 1, "verbosity": -1}
    booster = lightgbm.train(parameters, lightgbm.Dataset(points, kv / 100), num_boost_round=1)
    hull = Hull(max_batch=32, max_kv_blocks=300, max_prefill_tokens=2048)
    return Trained(
        seconds=booster,
        watts=booster,
        gpu="test-gpu",
        model="test-model",
        block_tokens=16,
        hulls={1: hull},
        clocks_measured=frozenset({1}),
        switches={1: ()},
    )


def test_trees_without_a_split_bake_too() -> None:
    trained = forest([(5, 0), (5, 1)])
    table = bake(trained, spec(1))
    assert table.seconds.shape == (1, 17)
    assert table.at(210, 7, 7, 7)[0] == pytest.approx(0.05**2, rel=1e-6)
    assert table.at(210, 7, 7, 7)[1] == pytest.approx(np.exp(0.05), rel=1e-6)


def test_an_iteration_of_no_time_is_refused() -> None:
    trained = forest([(0, 0), (10, 0)])
    text = re.sub(r"^leaf_value=.*$", "leaf_value=-0.1 0.1", trained.seconds.model_to_string(), flags=re.MULTILINE)
    with pytest.raises(ValueError, match="an iteration of no time"):
        bake(dataclasses.replace(trained, seconds=lightgbm.Booster(model_str=text)), spec(1))


def test_splits_of_another_kind_are_refused() -> None:
    points = np.zeros((60, len(FEATURES)))
    points[:, 2] = np.arange(60) % 3
    parameters = {"min_data_in_leaf": 1, "min_data_per_group": 1, "cat_smooth": 0, "verbosity": -1}
    data = lightgbm.Dataset(points, points[:, 2], categorical_feature=[2])
    with pytest.raises(ValueError, match="cannot bake a split =="):
        list(leaves(lightgbm.train(parameters, data, num_boost_round=1), 1))


def test_fast_enough(trained: Trained) -> None:
    began = time.process_time()
    bake(trained, spec(2))
    assert time.process_time() - began < 3.0


def test_the_hull_is_that_of_the_profile(tables: dict[int, PerformanceTable]) -> None:
    assert tables[2].inside(32, 600, 2048)
    assert not tables[2].inside(33, 600, 2048)
    assert not tables[1].inside(32, 600, 2048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "h100"}, "the profile is of gpu 'test-gpu', the engine has 'h100'"),
        ({"model": "other"}, "model 'test-model', the engine has 'other'"),
        ({"block_tokens": 64}, "block_tokens 16, the engine has 64"),
        ({"tp": 8}, "no row of the profile is of tp 8; profiled: 1, 2"),
    ],
)
def test_an_engine_that_was_not_profiled(trained: Trained, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bake(trained, dataclasses.replace(spec(1), **changes))
