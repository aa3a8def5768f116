"""One cell with one seed, ready to simulate: its requests, its SLOs, and the window that energy is counted over.

Knows nothing of which policies run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from throttllem.arena.cells import ATTAINMENT, SECONDS, Cell
from throttllem.config import LengthOptions, Options
from throttllem.core.types import Slo
from throttllem.engines.simulated.fleet import Fleet, build_fleet
from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.tables import Progress, performance_tables
from throttllem.sim.characterize import Capacity, capacities
from throttllem.sim.result import RunResult
from throttllem.sim.study import Scenario
from throttllem.sim.traces.trace import Trace, load_trace

_LENGTHS_S = 3600.0
"""Length of the trace that engines are characterised with: only the lengths of its requests are used."""
_CHARACTERISED_WITH = 0
"""Its seed, the same for every seed of a cell: capacity and E2E SLO belong to the cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRun:
    """A cell and a seed as a scenario. Energy is counted over the same window for every policy."""

    cell: Cell
    seed: int
    scenario: Scenario

    @property
    def window_s(self) -> float:
        """From the first arrival to the last, and the E2E SLO after it: by then a policy should be done."""
        return self.scenario.trace.duration_s + (self.scenario.slo.e2e_s or 0.0)

    def energy_j(self, run: RunResult) -> float:
        """Joules of a run over the window: idle after the run's end, or all of a run that takes longer."""
        idle_w = self.scenario.fleet.specs[self.cell.engine.tp].idle_w
        return run.energy_j + idle_w * max(0.0, self.window_s - run.duration_s)


def cell_run(
    cell: Cell,
    seed: int,
    catalogue: Catalogue,
    cache_dir: Path,
    *,
    trace: str | None = None,
    progress: Progress = lambda *_: None,
) -> CellRun:
    """Characterise the cell's engine, train its performance table (both cached), and make the requests of a seed.

    `trace` is a trace file to take the requests from instead of the generator's; it is scaled to the cell's load, and
    cut to SECONDS. Raises ValueError where the engine sustains no load under the cell's SLOs.
    """
    options = cell_options(cell)
    engine = cell.engine
    fleet = build_fleet(catalogue, engine.gpu, engine.model, (engine.tp,), options.batching)
    lengths = load_trace(trace, rescaled=True) if trace else _generated(cell, _LENGTHS_S, None, _CHARACTERISED_WITH)
    slo = Slo(tbt_s=cell.slo_tbt_s, ttft_s=cell.slo_ttft_s, attainment=ATTAINMENT)
    found = capacities(fleet, lengths, options, cache_dir, seed=_CHARACTERISED_WITH, slo=slo, progress=progress)
    capacity = found[engine.tp]
    tables = performance_tables(fleet, cache_dir, seed=_CHARACTERISED_WITH, progress=progress)
    peak_rps = _peak_rps(cell, capacity, fleet)
    requests = lengths.scaled(peak_rps=peak_rps).cut(SECONDS) if trace else _at_peak(cell, peak_rps, seed)
    scenario = Scenario(
        fleet=fleet,
        trace=requests,
        tables=tables,
        capacities=found,
        slo=replace(slo, e2e_s=capacity.e2e_p99_s),
        options=options,
        seed=seed,
    )
    return CellRun(cell=cell, seed=seed, scenario=scenario)


def cell_options(cell: Cell) -> Options:
    """The defaults, with what the cell sets. Nothing of the user's configuration: a cell is the same everywhere."""
    defaults = Options.model_construct()
    length = LengthOptions(p95_error=cell.length_error)
    return defaults.model_copy(
        update={
            "throttle": replace(defaults.throttle, switch_latency_s=cell.switch_latency_s),
            "length": replace(length, predictor=length.simulated),
        }
    )


def _peak_rps(cell: Cell, capacity: Capacity, fleet: Fleet) -> float:
    if not capacity.max_rps:
        raise ValueError(
            f"cell {cell.name}: {fleet.model} at TP {capacity.tp} on {fleet.gpu} sustains no load under the cell's "
            "SLOs; loosen them in the grid"
        )
    return cell.load * capacity.max_rps


def _at_peak(cell: Cell, peak_rps: float, seed: int) -> Trace:
    """About SECONDS of requests whose busiest minute is at `peak_rps`.

    The mean rate follows from how bursty the generator turns out at a first draw; the second draw is then stretched by
    the little that is left, so bursts keep the length that they have in the published traces.
    """
    first = _generated(cell, SECONDS, peak_rps, seed)
    return _generated(cell, SECONDS, peak_rps * peak_rps / first.peak_rps, seed).scaled(peak_rps=peak_rps)


def _generated(cell: Cell, seconds: float, rate_rps: float | None, seed: int) -> Trace:
    name, _, option = cell.workload.partition(":")
    options = [f"seconds={seconds:g}"]
    options += [f"rate={rate_rps:.6g}"] if rate_rps is not None else []
    if option:
        options.append(f"day={seconds:g}" if option == "day" else option)
    return load_trace(f"{name}:{','.join(options)}", seed=seed)
