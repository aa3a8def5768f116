"""Static clocks of a cell: runs of one clock from beginning to end, without a controller, so fast that all are tried.

They agree with `simulate --policy fixed:<MHz>`, the switch at the beginning included: energy to 0.01 %, attainment to
one request.
"""

from __future__ import annotations

import time

import numpy as np

from throttllem.arena.cell_run import CellRun
from throttllem.arena.outcome import Outcome
from throttllem.sim.samples import quantiles
from throttllem.sim.schedule import Held, Requests, ScheduledEngine


class StaticClocks:
    """One cell and seed, at any clock of its GPU."""

    def __init__(self, cell: CellRun) -> None:
        self._cell = cell
        scenario, tp = cell.scenario, cell.cell.engine.tp
        found = list(scenario.requests())
        self._spec, self._slo = scenario.fleet.specs[tp], scenario.slo
        self._requests = Requests(
            arrival_s=np.array([request.arrival_s for request in found], np.float64),
            prompt_tokens=np.array([request.prompt_tokens for request in found], np.int64),
            output_tokens=np.array([request.output_tokens for request in found], np.int64),
            max_tokens=np.array([request.max_tokens for request in found], np.int64),
        )
        self._engine = ScheduledEngine(
            self._spec, scenario.fleet.physics[tp], self._requests, seed=cell.seed, noise=scenario.options.noise
        )

    def at(self, clock_mhz: int) -> Outcome:
        """The outcome of one clock."""
        before_s = time.process_time()
        latency_s = self._cell.scenario.options.throttle.switch_latency_s
        maximum = self._spec.clocks_mhz[-1]
        clocks = [(0.0, maximum), (latency_s, clock_mhz)] if clock_mhz != maximum else [(0.0, maximum)]
        run = self._engine.run(self._engine.begin(), clocks)
        return self._outcome(clock_mhz, run, time.process_time() - before_s)

    def _outcome(self, clock_mhz: int, run: Held, cpu_s: float) -> Outcome:
        arrival_s, tokens = self._requests.arrival_s, self._requests.output_tokens
        first_s, ended_s, slo = run.first_token_s, run.ended_s, self._slo
        done = ~np.isnan(ended_s)
        ttft_s, e2e_s = first_s - arrival_s, ended_s - arrival_s
        tpot_s = (ended_s - first_s) / np.maximum(1, tokens - 1)
        met = done.copy()
        for value_s, limit_s in ((e2e_s, slo.e2e_s), (tpot_s, slo.tbt_s), (ttft_s, slo.ttft_s)):
            if limit_s is not None:
                met &= value_s <= limit_s
        ttft, tpot, e2e = quantiles(ttft_s[done]), quantiles(tpot_s[done & (tokens > 1)]), quantiles(e2e_s[done])
        maximum = self._spec.clocks_mhz[-1]
        return Outcome(
            setting=f"fixed:{clock_mhz}",
            energy_j=run.energy_j + self._engine.idle_w * max(0.0, self._cell.window_s - run.now_s),
            attainment=float(met.mean()),
            requests=arrival_s.size,
            mean_clock_mhz=float(clock_mhz),
            clock_switches=int(clock_mhz != maximum),
            ttft_p50_s=ttft.p50,
            ttft_p99_s=ttft.p99,
            tpot_p50_s=tpot.p50,
            tpot_p99_s=tpot.p99,
            e2e_p99_s=e2e.p99,
            decision_p99_s=None,
            cpu_s=cpu_s,
        )
