"""Runs of a cell under clocks that are known beforehand, without a controller: static clocks and the clairvoyant's.

Static clocks agree with `simulate --policy fixed:<MHz>`, the switch at the beginning included: energy to 0.01 %,
attainment to one request. A clairvoyant's clocks switch at once.
"""

from __future__ import annotations

import time

import numpy as np

from throttllem.arena import clairvoyant
from throttllem.arena.bound import lower_bound_j
from throttllem.arena.cell_run import CellRun
from throttllem.arena.outcome import Outcome
from throttllem.arena.schedule import Achieved as Found
from throttllem.arena.schedule import task_of
from throttllem.sim.samples import quantiles
from throttllem.sim.schedule import Held

CLAIRVOYANT_SOURCES = (__name__, clairvoyant.__name__, "throttllem.arena.schedule")
"""Modules that a clairvoyant's outcome depends on, besides the simulation."""
EVALUATIONS = 400
"""Runs that one descent of the clairvoyant search may make."""


class ScheduledRuns:
    """One cell and seed, under any clocks."""

    def __init__(self, cell: CellRun) -> None:
        scenario, tp = cell.scenario, cell.cell.engine.tp
        self._cell = cell
        self._spec, self._physics = scenario.fleet.specs[tp], scenario.fleet.physics[tp]
        self._task = task_of(
            self._spec,
            self._physics,
            list(scenario.requests()),
            slo=scenario.slo,
            window_s=cell.window_s,
            seed=cell.seed,
            noise=scenario.options.noise,
        )

    def at(self, clock_mhz: int) -> Outcome:
        """One clock from the beginning to the end."""
        before_s = time.process_time()
        maximum = self._spec.clocks_mhz[-1]
        latency_s = self._cell.scenario.options.throttle.switch_latency_s
        clocks = [(0.0, maximum), (latency_s, clock_mhz)] if clock_mhz != maximum else [(0.0, maximum)]
        run = self._task.engine.run(self._task.engine.begin(), clocks)
        return self._outcome(
            f"fixed:{clock_mhz}", run, float(clock_mhz), int(clock_mhz != maximum), time.process_time() - before_s
        )

    def search(self) -> tuple[Outcome, Outcome]:
        """The clairvoyant's cheapest clocks, and the cheapest if it may hold requests back too. Raises ValueError where
        no static clock meets enough.
        """
        before_s = time.process_time()
        clocks = clairvoyant.search(self._task, evaluations=EVALUATIONS)
        between_s = time.process_time()
        holding = clairvoyant.search_holding(self._task, clocks, evaluations=EVALUATIONS)
        return (
            self._found("sched", clocks, between_s - before_s),
            self._found("sched+hold", holding, time.process_time() - between_s),
        )

    def bound_j(self) -> float:
        """Joules over the window that no schedule can go below, holding or not."""
        return lower_bound_j(self._task, self._spec, self._physics)

    def _found(self, setting: str, found: Found, cpu_s: float) -> Outcome:
        mhz = np.array(self._spec.clocks_mhz)[found.plan.clocks]
        run = self._task.advance(self._task.engine.begin(), found.plan)
        return self._outcome(setting, run, float(mhz.mean()), int((np.diff(mhz) != 0).sum()), cpu_s)

    def _outcome(self, setting: str, run: Held, mean_clock_mhz: float, switches: int, cpu_s: float) -> Outcome:
        arrival_s, tokens = self._task.requests.arrival_s, self._task.requests.output_tokens
        first_s, ended_s = run.first_token_s, run.ended_s
        done = ~np.isnan(ended_s)
        tpot_s = (ended_s - first_s) / np.maximum(1, tokens - 1)
        ttft, tpot = quantiles((first_s - arrival_s)[done]), quantiles(tpot_s[done & (tokens > 1)])
        return Outcome(
            setting=setting,
            energy_j=self._task.energy_j(run),
            attainment=self._task.met(run) / arrival_s.size,
            requests=arrival_s.size,
            mean_clock_mhz=mean_clock_mhz,
            clock_switches=switches,
            ttft_p50_s=ttft.p50,
            ttft_p99_s=ttft.p99,
            tpot_p50_s=tpot.p50,
            tpot_p99_s=tpot.p99,
            e2e_p99_s=quantiles((ended_s - arrival_s)[done]).p99,
            decision_p99_s=None,
            cpu_s=cpu_s,
        )
