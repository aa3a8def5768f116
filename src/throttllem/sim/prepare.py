"""What is slow once: trained tables and characterised engines, kept in a cache under the inputs that made them.

A file's name is the digest of what it depends on (engines as they behave at sample points, options, lengths, versions),
so a changed catalogue, option or trace makes a new one. A file that cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import polars as pl

from throttllem.config import Options
from throttllem.core.performance import PerformanceTable
from throttllem.core.types import Slo
from throttllem.files import ensure_writable_dir, write_aside
from throttllem.learn.bake import bake
from throttllem.learn.measure import ProfilePlan, profile_engine
from throttllem.learn.storage import TableFileError, load_table, save_table
from throttllem.learn.train import TrainSettings, train
from throttllem.sim.characterize import METHOD, Capacity, characterize
from throttllem.sim.fleet import Fleet
from throttllem.sim.traces import Trace

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done (0 to 1)."""


def performance_tables(
    fleet: Fleet, cache_dir: Path, *, seed: int, progress: Progress = lambda *_: None
) -> dict[int, PerformanceTable]:
    """The baked table of every size of a fleet, trained on a noisy profile of its simulated engines."""
    plan = ProfilePlan(seed=seed)
    key = _digest("table", fleet.fingerprint(), asdict(plan), asdict(TrainSettings()))
    files = {tp: ensure_writable_dir(cache_dir) / f"table-{key}-tp{tp}.npz" for tp in fleet.sizes}
    try:
        return {tp: load_table(file) for tp, file in files.items()}
    except (TableFileError, FileNotFoundError):
        tables = _learn(fleet, plan, progress)
    for tp, file in files.items():
        save_table(tables[tp], file)
    return tables


def profile_fleet(fleet: Fleet, plan: ProfilePlan, progress: Progress = lambda *_: None) -> pl.DataFrame:
    """The profile of every size, one below the other."""
    frames = []
    for tp in fleet.sizes:
        frames.append(
            profile_engine(
                fleet.physics[tp], fleet.specs[tp], plan, lambda done, total: progress("profiling", done / total)
            )
        )
    return pl.concat(frames)


def capacities(
    fleet: Fleet,
    trace: Trace,
    options: Options,
    cache_dir: Path,
    *,
    seed: int,
    promised: Slo,
    progress: Progress = lambda *_: None,
) -> dict[int, Capacity]:
    """Maximum load and E2E of every size: the others under the E2E that the largest has, unless one is promised."""
    found: dict[int, Capacity] = {}
    for done, tp in enumerate(reversed(fleet.sizes)):
        progress("characterising", done / len(fleet.sizes))
        if found and promised.e2e_s is None:
            promised = replace(promised, e2e_s=found[fleet.sizes[-1]].e2e_p99_s)
        found[tp] = _capacity(fleet, tp, trace, options, cache_dir, seed=seed, promised=promised)
    progress("characterising", 1.0)
    return found


def _learn(fleet: Fleet, plan: ProfilePlan, progress: Progress) -> dict[int, PerformanceTable]:
    profile = profile_fleet(fleet, plan, progress)
    progress("training", 0.0)
    trained = train(profile)
    progress("training", 1.0)
    return {tp: bake(trained, fleet.specs[tp]) for tp in fleet.sizes}


def _capacity(
    fleet: Fleet, tp: int, trace: Trace, options: Options, cache_dir: Path, *, seed: int, promised: Slo
) -> Capacity:
    lengths = hashlib.sha256(trace.prompt_tokens.tobytes() + trace.answer_tokens.tobytes()).hexdigest()
    alone = replace(fleet, specs={tp: fleet.specs[tp]}, physics={tp: fleet.physics[tp]})
    inputs = {
        "engines": alone.fingerprint(),
        "gpu": fleet.gpu,
        "model": fleet.model,
        "trace": trace.name,
        "lengths": lengths,
        "engine": asdict(options.engine),
        "noise": asdict(options.noise),
        "method": METHOD,
        "seed": seed,
        "promised": asdict(promised),
    }
    file = ensure_writable_dir(cache_dir) / f"capacity-{_digest(inputs)}.json"
    try:
        return Capacity(**json.loads(file.read_text())["capacity"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        capacity = characterize(fleet, tp, trace, options, seed=seed, promised=promised)
    with write_aside(file) as aside:
        aside.write_text(json.dumps({"inputs": inputs, "capacity": asdict(capacity)}, indent=1))
    return capacity


def _digest(*inputs: object) -> str:
    versions = [version(name) for name in ("throttllem", "lightgbm", "numpy")]
    return hashlib.sha256(json.dumps([versions, *inputs], sort_keys=True).encode()).hexdigest()[:20]
