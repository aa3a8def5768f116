"""All measurements in one value, and sentences about them. Knows nothing of criteria."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from throttllem.profiling.score import Score, ScoreCard
from throttllem.report.metrics import percent, slo_met
from throttllem.reproduce.experiments import BASELINE, MAIN_MODEL, Comparison
from throttllem.reproduce.probes import ClockSweep, KvCorrelation
from throttllem.sim.result import RunResult

HELD_OUT = "random 90/10"
"""The paper's split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Runs by engine and over sizes, with lengths as the gateway predicts them (`reproduce --lengths oracle`: by an
    oracle), by an oracle, and by one with 30 % error; over sizes also at half the load.
    """

    engines: tuple[Comparison, ...]
    engines_oracle: tuple[Comparison, ...]
    engines_error: tuple[Comparison, ...]
    sizes: Comparison
    sizes_oracle: Comparison
    sizes_error: Comparison
    sizes_half: Comparison
    cards: tuple[ScoreCard, ...]
    correlation: KvCorrelation
    sweep: ClockSweep

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Those of the paper's evaluation, each once."""
        every = (
            *(*self.engines, self.sizes),
            *(*self.engines_oracle, self.sizes_oracle),
            *(*self.engines_error, self.sizes_error),
        )
        return tuple({id(each): each for each in every}.values())

    def engine(self, tp: int) -> Comparison:
        """The main model's engine of that size. Raises KeyError where it was not run."""
        for comparison in self.engines:
            if (comparison.study.model, comparison.study.sizes) == (MAIN_MODEL, (tp,)):
                return comparison
        raise KeyError(f"no run of {MAIN_MODEL} at TP {tp}")

    def scores(self) -> dict[str, Score]:
        """The paper's split, by engine."""
        return {
            f"{card.model} TP {score.tp}": score
            for card in self.cards
            for score in card.scores
            if score.split == HELD_OUT and score.tp is not None
        }

    def runs_of(self, clock_policy: str) -> Iterator[tuple[Comparison, RunResult]]:
        """Every run of a policy, with and without autoscaling."""
        for comparison in self.comparisons:
            for name, run in comparison.runs.items():
                if name.removesuffix("+autoscale") == clock_policy:
                    yield comparison, run


def label(comparison: Comparison, run: RunResult) -> str:
    """Engine, policy and predictor of a run."""
    return f"{comparison.name} {run.policy} (lengths {comparison.lengths})"


def each_of(values: dict[str, str]) -> str:
    """Names with their values, as a sentence."""
    return ", ".join(f"{name} {value}" for name, value in values.items()) + "."


def p99_of(comparison: Comparison, run: RunResult) -> str:
    """The E2E p99 of a run, its SLO, and its baseline's p99."""
    beside = "" if run.policy == BASELINE else f" (triton {comparison.baseline.e2e_s.p99 or 0:.1f} s)"
    return f"{label(comparison, run)} E2E p99 {run.e2e_s.p99 or 0:.1f} s of {run.slo.e2e_s or 0:.1f} s{beside}"


def slo_violations(comparisons: tuple[Comparison, ...], policy: str) -> str:
    """Runs whose attainment is more than half a point below their baseline's, and how long their requests waited for a
    place in the batch; empty if there are none.
    """
    worse = [
        f"{label(comparison, comparison.runs[policy])} {percent(comparison.runs[policy].slo.attainment)} % "
        f"(triton {percent(comparison.baseline.slo.attainment)} %; p99 wait for a place "
        f"{comparison.runs[policy].queue_s.p99 or 0:.1f} s, triton {comparison.baseline.queue_s.p99 or 0:.1f} s)"
        for comparison in comparisons
        if not slo_met(comparison.runs[policy], comparison.baseline)
    ]
    return f"Attainment more than half a point below the baseline's: {', '.join(worse)}." if worse else ""


def savings(comparisons: tuple[Comparison, ...], policy: str) -> str:
    """The saving of a policy in each comparison."""
    parts = [f"{each.name} {-each.saved(policy) * 100:+.1f} %" for each in comparisons]
    return f"{policy}: {', '.join(parts)}."


def draw(comparison: Comparison, policy: str) -> str:
    """Watts and clock of a policy and of its baseline, and whether least-energy found a cheaper clock."""
    run, baseline = comparison.runs[policy], comparison.baseline
    rate = f"{baseline.requests / baseline.duration_s:.2f} requests/s"
    text = (
        f"{comparison.name}: triton draws {_watts(baseline)} at {rate} and {baseline.mean_clock_mhz:.0f} MHz, "
        f"{policy} {_watts(run)} at {run.mean_clock_mhz:.0f} MHz."
    )
    idle = run.idle_energy_j / run.energy_j
    text += f" {percent(idle)} % of that with nothing running." if idle > 0.001 else ""
    ours = policy.replace("throttllem", "least-energy")
    if ours != policy and ours in comparison.runs and comparison.runs[ours].energy_j < run.energy_j:
        text += (
            f" The lowest feasible clock is not the cheapest: least-energy saves {percent(comparison.saved(ours))} % "
            f"there, at {comparison.runs[ours].mean_clock_mhz:.0f} MHz."
        )
    return text


def time_by_size(comparison: Comparison, policy: str) -> str:
    """How long each engine size served, the arrival rate, and the maximum load of each size."""
    run = comparison.runs[policy]
    ends = pairwise([*run.sizes, (run.duration_s, 0)])
    served: defaultdict[int, float] = defaultdict(float)
    for (since_s, tp), (until_s, _) in ends:
        served[tp] += until_s - since_s
    shares = ", ".join(f"TP {tp} {served[tp] / run.duration_s * 100:.0f} %" for tp in sorted(served))
    loads = ", ".join(f"TP {tp} {comparison.capacities[tp].max_rps:.2f}" for tp in sorted(comparison.capacities))
    headroom = comparison.study.options.autoscale.headroom
    return (
        f"Sizes by share of the time: {shares} ({len(run.sizes) - 1} changes); mean rate "
        f"{comparison.baseline.requests / comparison.baseline.duration_s:.2f} requests/s, maximum loads {loads} "
        f"(taken up to {headroom * 100:.0f} % of them)."
    )


def violations(runs: list[RunResult]) -> str:
    """The requests of all these runs that violated an SLO, by cause."""
    total = sum(run.requests for run in runs)
    causes: Counter[str] = Counter()
    for run in runs:
        causes.update({f"rejected ({why})": count for why, count in run.rejections.items()})
        causes["finished past their E2E SLO"] += round((1 - run.slo.e2e_attainment) * run.requests) - run.rejected
        causes["over the TBT SLO"] += round((1 - run.slo.tbt_attainment) * run.requests) - run.rejected
        causes["marked lost on the way"] += run.lost
    listed = ", ".join(f"{count:,} {cause}" for cause, count in causes.items() if count > 0)
    return f"{total:,} requests: {listed or 'every SLO met'}."


def _watts(run: RunResult) -> str:
    return f"{run.energy_j / run.duration_s:,.0f} W"
