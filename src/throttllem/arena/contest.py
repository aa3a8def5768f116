"""Runs an arena: every contender on every cell and seed, cells side by side.

Knows nothing of how results are judged or shown.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from throttllem.arena.cell_run import CellRun, cell_run
from throttllem.arena.cells import Cell, Grid
from throttllem.arena.contenders import (
    BASELINE,
    BEFOREHAND,
    SCHED,
    SCHED_HOLD,
    STATIC,
    YESTERDAY,
    Field,
)
from throttllem.arena.outcome import Outcome, best, simulated
from throttllem.arena.run_cache import RunCache
from throttllem.arena.scheduled import CLAIRVOYANT_SOURCES, ScheduledRuns
from throttllem.core.clocks.policy import Policy
from throttllem.physics.catalogue import Catalogue
from throttllem.sim import parallel
from throttllem.sim.own_policy import named_policy

Report = Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One cell with one seed: the baseline, a row for each contender, and all that hindsight chose from."""

    cell: Cell
    seed: int
    slo_e2e_s: float
    requests: int
    window_s: float
    baseline: Outcome
    bound_j: float | None
    """What no schedule of clocks can go below, holding or not (None: the clairvoyant did not run)."""
    rows: dict[str, Outcome]
    tried: dict[str, tuple[Outcome, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """What to run. `trace`: a file whose requests replace the generated ones."""

    grid: Grid
    seeds: tuple[int, ...]
    field: Field
    catalogue: Path | None
    cache_dir: Path
    trace: str | None = None

    def run(self, workers: int, progress: Callable[[str, float], None] = lambda *_: None) -> list[Entry]:
        """Every cell, in order of the grid, with every seed. Raises ValueError for a cell that cannot be."""
        tasks = [functools.partial(_cell_entries, self, cell) for cell in self.grid.cells]
        shares = dict.fromkeys(range(len(tasks)), 0.0)

        def report(index: int, share: float) -> None:
            shares[index] = share
            done = sum(1 for share in shares.values() if share >= 1.0)
            progress(f"{done} of {len(tasks)} cells", sum(shares.values()) / len(tasks))

        return [
            entry for entries in parallel.side_by_side(tasks, workers=workers, progress=report) for entry in entries
        ]


def _cell_entries(arena: Arena, cell: Cell, report: Report) -> list[Entry]:
    """All seeds of a cell."""
    catalogue = Catalogue.load(arena.catalogue)
    found: list[Entry] = []
    runs: list[_Runs] = []
    for number, seed in enumerate(arena.seeds):
        prepared = cell_run(cell, seed, catalogue, arena.cache_dir, trace=arena.trace)
        each = _Runs(prepared, arena)
        runs.append(each)
        try:
            found.append(each.entry(functools.partial(_part, report, number, len(arena.seeds))))
        finally:  # interrupted, or ended by a policy: the next arena goes on from here
            each.cache.save()
    if YESTERDAY in arena.field.names:
        for index, each in enumerate(runs):
            if len(runs) > 1:
                of_yesterday = found[index - 1].rows[STATIC].setting.removeprefix("fixed:")
                rows = {**found[index].rows, YESTERDAY: each.at_clock(int(of_yesterday))}
                found[index] = replace(found[index], rows=rows)
    return found


def _part(report: Report, number: int, parts: int, share: float) -> None:
    """Progress within one of several equal parts."""
    report(0.99 * (number + share) / parts)


def _simulated(cell: CellRun, policy: Policy) -> Outcome:
    before_s = time.process_time()
    run = cell.scenario.run(policy)
    return simulated(cell, policy, time.process_time() - before_s, run)


class _Runs:
    """The runs of one cell and seed."""

    def __init__(self, prepared: CellRun, arena: Arena) -> None:
        self.cell = prepared
        self.field = arena.field
        self._scheduled = ScheduledRuns(prepared)
        inputs = {"cell": asdict(prepared.cell), "seed": prepared.seed, "trace": prepared.scenario.trace.sha256}
        name = f"{prepared.cell.name.replace('/', '-')}-{prepared.seed}"
        self.cache = RunCache(folder=arena.cache_dir / "arena", name=name, inputs=inputs)

    def entry(self, report: Report) -> Entry:
        """Every contender. Where hindsight may choose, it chooses for this cell and seed."""
        field, scenario = self.field, self.cell.scenario
        total = (
            1 + len(field.plain) + sum(len(rival.values) for rival in field.rivals) + field.static + field.clairvoyant
        )
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            report(min(1.0, done / total))

        baseline = self.run(BASELINE)
        rows, tried = {BASELINE: baseline}, dict[str, tuple[Outcome, ...]]()
        for name in field.plain:
            rows[name] = self.run(name)
            step()
        if field.static:
            tried[STATIC] = tuple(self.at_clock(clock_mhz) for clock_mhz in scenario.fleet.clocks_mhz)
            rows[STATIC] = best(list(tried[STATIC]), baseline)
            step()
        for rival in field.rivals:
            outcomes = []
            for value in rival.values:
                outcomes.append(self.run_policy(rival.policy(value)))
                step()
            tried[rival.name] = tuple(outcomes)
            rows[rival.name] = best(outcomes, baseline)
            rows[rival.name + BEFOREHAND] = self.run_policy(rival.policy(rival.beforehand))
        bound_j = None
        if field.clairvoyant:
            rows |= self._clairvoyant()
            bound_j = self._scheduled.bound_j()
            step()
        assert scenario.slo.e2e_s is not None
        return Entry(
            cell=self.cell.cell,
            seed=self.cell.seed,
            slo_e2e_s=scenario.slo.e2e_s,
            requests=scenario.trace.requests,
            window_s=self.cell.window_s,
            baseline=baseline,
            bound_j=bound_j,
            rows=rows,
            tried=tried,
        )

    def run(self, name: str) -> Outcome:
        """A policy by its name."""
        fleet = self.cell.scenario.fleet
        return self.run_policy(named_policy(name, fleet.clocks_mhz, fleet.sizes))

    def _clairvoyant(self) -> dict[str, Outcome]:
        """The clairvoyant's rows; none where no static clock meets enough."""
        found: dict[str, Outcome] = {}

        def search(name: str) -> Outcome:
            if not found:
                found[SCHED], found[SCHED_HOLD] = self._scheduled.search()
            return found[name]

        try:
            return {
                name: self.cache.scheduled(name, functools.partial(search, name), CLAIRVOYANT_SOURCES)
                for name in (SCHED, SCHED_HOLD)
            }
        except ValueError:
            return {}

    def at_clock(self, clock_mhz: int) -> Outcome:
        """A static clock."""
        return self._scheduled.at(clock_mhz)

    def run_policy(self, policy: Policy) -> Outcome:
        """One simulation, or what is known of it."""
        return self.cache.outcome(policy, lambda: _simulated(self.cell, policy))


def rows_of(entries: Sequence[Entry]) -> tuple[str, ...]:
    """The contenders that have a row in every entry, in order."""
    names = dict.fromkeys(name for entry in entries for name in entry.rows)
    return tuple(name for name in names if all(name in entry.rows for entry in entries))
