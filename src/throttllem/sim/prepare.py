"""Characterised engines, cached under the inputs that made them, as trained tables are (`profiling/tables.py`).

A changed catalogue, option or trace makes a new one. A file that cannot be read is made again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from throttllem.config import Options
from throttllem.core.types import Slo
from throttllem.engines.simulated.fleet import Fleet
from throttllem.files import ensure_writable_dir, write_aside
from throttllem.profiling.tables import Progress, digest
from throttllem.sim.characterize import METHOD, Capacity, characterize
from throttllem.sim.traces import Trace


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


def _capacity(
    fleet: Fleet, tp: int, trace: Trace, options: Options, cache_dir: Path, *, seed: int, promised: Slo
) -> Capacity:
    lengths = hashlib.sha256(trace.prompt_tokens.tobytes() + trace.output_tokens.tobytes()).hexdigest()
    alone = replace(fleet, specs={tp: fleet.specs[tp]}, physics={tp: fleet.physics[tp]})
    inputs = {
        "engines": alone.fingerprint(),
        "gpu": fleet.gpu,
        "model": fleet.model,
        "trace": trace.name,
        "lengths": lengths,
        "engine": asdict(options.batching),
        "noise": asdict(options.noise),
        "method": METHOD,
        "seed": seed,
        "promised": asdict(promised),
    }
    file = ensure_writable_dir(cache_dir) / f"capacity-{digest(inputs)}.json"
    try:
        return Capacity(**json.loads(file.read_text())["capacity"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        capacity = characterize(fleet, tp, trace, options, seed=seed, promised=promised)
    with write_aside(file) as aside:
        aside.write_text(json.dumps({"inputs": inputs, "capacity": asdict(capacity)}, indent=1))
    return capacity
