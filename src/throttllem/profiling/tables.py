"""Trained tables of simulated engines, in a cache.

A file's name is a digest of everything that it depends on (the engines' behaviour at sample points, options, versions),
so a changed catalogue or option makes a new file. A file that cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import polars as pl

from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.engines.simulated.fleet import Fleet
from throttllem.files import ensure_writable_dir
from throttllem.profiling.bake import bake
from throttllem.profiling.measure import ProfilePlan, profile_engine
from throttllem.profiling.storage import TableFileError, load_table, save_table
from throttllem.profiling.train import TrainSettings, train

Progress = Callable[[str, float], None]
"""Called with the work in progress and the share that is done (0 to 1)."""


def performance_tables(
    fleet: Fleet, cache_dir: Path, *, seed: int, progress: Progress = lambda *_: None
) -> dict[int, PerformanceTable]:
    """The baked table of every size of a fleet, trained on a noisy profile of its simulated engines."""
    plan = ProfilePlan(seed=seed)
    key = digest("table", fleet.fingerprint(), asdict(plan), asdict(TrainSettings()))
    files = {tp: ensure_writable_dir(cache_dir) / f"table-{key}-tp{tp}.npz" for tp in fleet.sizes}
    try:
        return {tp: load_table(file) for tp, file in files.items()}
    except (TableFileError, FileNotFoundError):
        tables = _learn(fleet, plan, progress)
    for tp, file in files.items():
        save_table(tables[tp], file)
    return tables


def profile_fleet(fleet: Fleet, plan: ProfilePlan, progress: Progress = lambda *_: None) -> pl.DataFrame:
    """The profile of every size."""

    def report(done: int, total: int) -> None:
        progress("profiling", done / total)

    return pl.concat(profile_engine(fleet.physics[tp], fleet.specs[tp], plan, report) for tp in fleet.sizes)


def digest(*inputs: object) -> str:
    """A digest of these inputs and of the versions of the code that uses them."""
    versions = [version(name) for name in ("throttllem", "lightgbm", "numpy")]
    return hashlib.sha256(json.dumps([versions, *inputs], sort_keys=True).encode()).hexdigest()[:20]


def _learn(fleet: Fleet, plan: ProfilePlan, progress: Progress) -> dict[int, PerformanceTable]:
    profile = profile_fleet(fleet, plan, progress)
    progress("training", 0.0)
    trained = train(profile)
    progress("training", 1.0)
    return {tp: bake(trained, fleet.specs[tp]) for tp in fleet.sizes}
