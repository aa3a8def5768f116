"""The figures of one run of one policy on one cell and seed, as they are compared, cached and written down."""

from __future__ import annotations

from dataclasses import dataclass

from throttllem.arena.cell_run import CellRun
from throttllem.core.clocks.policy import Policy
from throttllem.report.metrics import ATTAINMENT_SLACK
from throttllem.sim.result import RunResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run. `setting` names the policy with its parameter; energy is over the cell's window, attainment over all
    arrivals, latencies of completed requests (None: none completed). `cpu_s`: processor seconds of the simulation.
    """

    setting: str
    energy_j: float
    attainment: float
    requests: int
    mean_clock_mhz: float
    clock_switches: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    e2e_p99_s: float | None
    decision_p99_s: float | None
    cpu_s: float

    def meets(self, baseline: Outcome) -> bool:
        """Whether attainment is at most half a point below the baseline's."""
        return self.attainment >= baseline.attainment - ATTAINMENT_SLACK - 1e-12

    def saved(self, baseline: Outcome) -> float:
        """Fraction of the baseline's energy; negative if it used more."""
        return 1.0 - self.energy_j / baseline.energy_j


def simulated(cell: CellRun, policy: Policy, cpu_s: float, run: RunResult) -> Outcome:
    """The outcome of a simulation."""
    return Outcome(
        setting=policy.name,
        energy_j=cell.energy_j(run),
        attainment=run.slo.attainment,
        requests=run.requests,
        mean_clock_mhz=run.mean_clock_mhz,
        clock_switches=run.clock_switches,
        ttft_p50_s=run.ttft_s.p50,
        ttft_p99_s=run.ttft_s.p99,
        tpot_p50_s=run.tpot_s.p50,
        tpot_p99_s=run.tpot_s.p99,
        e2e_p99_s=run.e2e_s.p99,
        decision_p99_s=run.decision_s.p99,
        cpu_s=cpu_s,
    )


def best(outcomes: list[Outcome], baseline: Outcome) -> Outcome:
    """In hindsight: the least energy of those that meet the baseline's attainment; where none does, the one that comes
    closest.
    """
    meeting = [outcome for outcome in outcomes if outcome.meets(baseline)]
    if meeting:
        return min(meeting, key=lambda outcome: outcome.energy_j)
    return max(outcomes, key=lambda outcome: (outcome.attainment, -outcome.energy_j))
