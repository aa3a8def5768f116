"""What a run came to, measured or simulated, in the same figures; medians over rounds. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean, median
from typing import Any, NamedTuple

from tools.loop import readings
from tools.loop.plan import Plan
from tools.loop.readings import Answered, Meter, Replayed, Steps, percentile
from tools.testbed.trace import Sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Joules of the window, latencies by the client's clock (`itl_mean_s`: over requests, of their means), the share of
    all requests that met both SLOs, and the clock over the time that the engine worked.
    """

    energy_j: float
    tokens_per_j: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_mean_s: float
    e2e_p50_s: float
    e2e_p99_s: float
    attainment: float
    clock_mhz: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the control costs: seconds from an event to the clock command on its way, and of a decision in the core
    (None: there was none); shares of a core.
    """

    commands: int
    command_p50_s: float | None
    command_p99_s: float | None
    decisions: int
    decision_p50_s: float | None
    decision_p99_s: float | None
    gateway_share: float
    keeper_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a run rests on: steps, the share of them that the engine could not compute in time, what the engine computed
    and its host did of a step (mean shares); joules by the sum of the steps, and by aiperf (None: none read); `quiet`:
    all of it ran before other work of the machine, whose `load` average was this before.
    """

    steps: int
    overruns: float
    real_share: float
    host_share: float
    hook_j: float
    aiperf_j: float | None
    freed_s: float
    load: float
    quiet: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One replay through the gateway. `clocks`: "on" or "dry-run"; `predicted`: the saving that it predicted."""

    policy: str
    clocks: str
    round: int
    requests: int
    answered: int
    began_s: float
    figures: Figures
    cost: Cost
    trust: Trust
    predicted: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measured(replayed: Replayed, meter: Meter, steps: Steps, plan: Plan, requests: int) -> Figures:
    """Of one run. Raises ValueError if nothing was answered."""
    answered = replayed.answered
    if not answered:
        raise ValueError("no request was answered")
    began_s = began(answered)
    energy_j = meter.joules(began_s, began_s + plan.window_s)
    ttft, e2e = [one.ttft_s for one in answered], [one.e2e_s for one in answered]
    return Figures(
        energy_j=energy_j,
        tokens_per_j=sum(one.tokens for one in answered) / energy_j,
        ttft_p50_s=percentile(ttft, 50),
        ttft_p99_s=percentile(ttft, 99),
        itl_mean_s=fmean(one.itl_s for one in answered if one.itl_s is not None),
        e2e_p50_s=percentile(e2e, 50),
        e2e_p99_s=percentile(e2e, 99),
        attainment=met(answered, plan.e2e_s, plan.tbt_s) / requests,
        clock_mhz=steps.mean_clock_mhz(),
    )


def began(answered: Sequence[Answered]) -> float:
    """When the first request was sent."""
    return min(one.sent_s for one in answered)


def cost(before: bytes, after: bytes, meter: Meter, from_s: float, to_s: float) -> Cost:
    """From two looks at the gateway's metrics, and the meter."""
    command, decision = "throttllem_clock_command_seconds", "throttllem_decision_seconds"
    return Cost(
        commands=readings.count(before, after, command),
        command_p50_s=readings.quantile(before, after, command, 0.5),
        command_p99_s=readings.quantile(before, after, command, 0.99),
        decisions=readings.count(before, after, decision),
        decision_p50_s=readings.quantile(before, after, decision, 0.5),
        decision_p99_s=readings.quantile(before, after, decision, 0.99),
        gateway_share=meter.share(meter.gateway_s, from_s, to_s),
        keeper_share=meter.share(meter.keeper_s, from_s, to_s),
    )


def trust(steps: Steps, replayed: Replayed, *, freed_s: float, load: float, quiet: bool) -> Trust:
    """Of one run."""
    spent_s = float(steps.seconds.sum()) or float("nan")
    return Trust(
        steps=steps.over.size,
        overruns=float(steps.over.mean()) if steps.over.size else 0.0,
        real_share=float(steps.real_s.sum()) / spent_s,
        host_share=float(steps.waited_s.sum()) / spent_s,
        hook_j=float(steps.joules.sum()),
        aiperf_j=replayed.energy_j,
        freed_s=freed_s,
        load=load,
        quiet=quiet,
    )


def simulated(run: Mapping[str, Any], plan: Plan, idle_w: float) -> Figures:
    """Of one run of `throttllem simulate --json`, which ends with its last request: it idles until the window does."""
    energy_j = run["energy_j"] + idle_w * max(0.0, plan.window_s - run["duration_s"])
    return Figures(
        energy_j=energy_j,
        tokens_per_j=run["generated_tokens"] / energy_j,
        ttft_p50_s=run["ttft_s"]["p50"],
        ttft_p99_s=run["ttft_s"]["p99"],
        itl_mean_s=run["tpot_s"]["mean"],
        e2e_p50_s=run["e2e_s"]["p50"],
        e2e_p99_s=run["e2e_s"]["p99"],
        attainment=run["slo"]["attainment"],
        clock_mhz=run["mean_clock_mhz"],
    )


def middle(runs: Sequence[Figures]) -> Figures:
    """Figure by figure the median."""
    return Figures(**{field.name: median(getattr(run, field.name) for run in runs) for field in fields(Figures)})


def saving(of: Figures, against: Figures) -> float:
    """The share of the energy that was not taken."""
    return 1.0 - of.energy_j / against.energy_j


def met(answered: Iterable[Answered], e2e_s: float, tbt_s: float) -> int:
    """How many met both SLOs."""
    return sum(one.e2e_s <= e2e_s and (one.itl_s is None or one.itl_s <= tbt_s) for one in answered)


Simulated = Mapping[str, Figures]


class Found(NamedTuple):
    """Runs in the order in which they were made; the simulation by policy, and that with the live gateway's table (both
    empty: none was made).
    """

    plan: Plan
    sent: Sequence[Sent]
    runs: Sequence[Run]
    simulated: Simulated
    informed: Simulated

    def of(self, policy: str) -> list[Run]:
        """The runs of a policy that set clocks."""
        return [run for run in self.runs if run.policy == policy and run.clocks == "on"]

    def middle(self, policy: str) -> Figures:
        """Their medians."""
        return middle([run.figures for run in self.of(policy)])

    def the_dry_run(self) -> Run | None:
        """The run that set no clock."""
        return next((run for run in self.runs if run.predicted is not None), None)
