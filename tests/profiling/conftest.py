from __future__ import annotations

import polars as pl
import pytest

from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.profiling.bake import bake
from throttllem.profiling.train import Trained, TrainSettings, train

from .analytic import profile, spec

SMALL = TrainSettings(rounds=60, leaves=63, learning_rate=0.15, threads=1)


@pytest.fixture(scope="session")
def measured() -> pl.DataFrame:
    return profile()


@pytest.fixture(scope="session")
def trained(measured: pl.DataFrame) -> Trained:
    return train(measured, SMALL)


@pytest.fixture(scope="session")
def tables(trained: Trained) -> dict[int, PerformanceTable]:
    return {tp: bake(trained, spec(tp)) for tp in (1, 2)}
