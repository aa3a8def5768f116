"""The figures of a run: how each is written, compared with the baseline and judged against the SLOs.

One list (`METRICS`) for the terminal and the page, and one sentence (`verdict`) for each run. A figure that a policy
does not have is written as ABSENT. Knows nothing of how figures are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from throttllem.config import CostOptions
from throttllem.report.certainty import saving_interval
from throttllem.report.cost import Cost, cost
from throttllem.sim.result import ProjectionError, RunResult, SloOutcome

ABSENT = "–"
ATTAINMENT_SLACK = 0.005
"""Attainment may lie half a point below the baseline's: the baseline, too, violates some SLOs under a high load."""
_SAME_ENERGY = 5e-4
"""A smaller difference would print as 0.0 %."""


# ---- how figures are written -----------------------------------------------------------------------------------


def kilojoules(energy_j: float) -> str:
    """Energy in kJ, without the unit."""
    return f"{energy_j / 1e3:,.1f}" if energy_j < 1e6 else f"{energy_j / 1e3:,.0f}"


def seconds(value_s: float | None) -> str:
    """Seconds, without the unit."""
    if value_s is None:
        return ABSENT
    return f"{value_s:.2f}" if value_s < 10 else f"{value_s:,.1f}"


def milliseconds(value_s: float | None) -> str:
    """Milliseconds, without the unit."""
    if value_s is None:
        return ABSENT
    return f"{value_s * 1e3:.1f}" if value_s < 0.1 else f"{value_s * 1e3:,.0f}"


def percent(fraction: float | None, *, decimals: int = 1) -> str:
    """A fraction in per cent, without the sign."""
    return ABSENT if fraction is None else f"{fraction * 100:.{decimals}f}"


def amount(value: float | None) -> str:
    """A positive quantity with three significant digits."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}" if value else "0"


def change(fraction_saved: float | None) -> str:
    """A saving as a signed change in per cent: 0.312 saved is −31.2."""
    if fraction_saved is None:
        return ABSENT
    return f"{-fraction_saved * 100:+z.1f}".replace("+0.0", "0.0").replace("-", "−")


def slos(slo: SloOutcome) -> str:
    """The SLOs of a run, with units."""
    parts = [
        f"E2E {seconds(slo.e2e_s)} s" if slo.e2e_s is not None else "",
        f"mean TBT of a request {milliseconds(slo.tbt_s)} ms" if slo.tbt_s is not None else "",
        f"TTFT {seconds(slo.ttft_s)} s" if slo.ttft_s is not None else "",
    ]
    named = ", ".join(part for part in parts if part)
    return f"{named}; {percent(slo.asked)} % of requests shall meet it" if named else "none"


# ---- the comparison with the baseline --------------------------------------------------------------------------


def baseline_of(runs: Sequence[RunResult]) -> RunResult:
    """The run that all others are compared with: `triton`, else the first `triton+...`, else the first.

    Raises ValueError if there are no runs.
    """
    if not runs:
        raise ValueError("no runs: there is nothing to report")
    exact = [run for run in runs if run.policy == "triton"]
    scaled = [run for run in runs if run.policy.startswith("triton+")]
    return (exact or scaled or list(runs))[0]


def saved(run: RunResult, baseline: RunResult) -> float | None:
    """Fraction of the baseline's energy that the run saved; negative if it used more."""
    return 1 - run.energy_j / baseline.energy_j if baseline.energy_j > 0 else None


def gain(run: RunResult, baseline: RunResult) -> float | None:
    """Tokens per joule as a multiple of the baseline's."""
    return run.tokens_per_joule / baseline.tokens_per_joule if baseline.tokens_per_joule > 0 else None


def slo_met(run: RunResult, baseline: RunResult) -> bool:
    """Whether attainment is at most half a point below the baseline's."""
    return run.slo.attainment >= baseline.slo.attainment - ATTAINMENT_SLACK - 1e-12


def verdict(run: RunResult, baseline: RunResult) -> str:
    """One sentence: energy, tokens per joule and attainment against the baseline, and what the saving cost. A
    simulation saves nothing, so it says how the simulated energies differ.
    """
    attainment = f"attainment {percent(run.slo.attainment)} %"
    if run is baseline:
        return (
            f"{run.policy}: the baseline, {run.energy_j / 1e3:,.1f} kJ simulated, "
            f"{run.tokens_per_joule:.3f} tokens per joule, {attainment}"
        )
    fraction, ratio = saved(run, baseline), gain(run, baseline)
    if fraction is None:
        energy = f"{run.energy_j / 1e3:,.1f} kJ simulated ({baseline.policy} used none)"
    elif abs(fraction) < _SAME_ENERGY:
        energy = f"the same simulated energy as {baseline.policy}"
    else:
        side = "below" if fraction > 0 else "above"
        interval = saving_interval(run, baseline)
        chance = f" (±{interval[0] * 100:.1f})" if interval else ""
        energy = f"simulated energy {percent(abs(fraction))} %{chance} {side} {baseline.policy}'s"
    parts = [
        f"{run.policy}: {energy}",
        *([] if ratio is None else [f"{ratio:.2f}x tokens per joule"]),
        f"{attainment} ({baseline.policy} {percent(baseline.slo.attainment)} %)",
        *([f"p95 latency: {slower}"] if (slower := _slower(run, baseline)) else []),
    ]
    costs = []
    if not slo_met(run, baseline):
        points = percent(baseline.slo.attainment - run.slo.attainment)
        costs.append(f"meets fewer SLOs ({points} points below {baseline.policy})")
    if (undone := baseline.completed - run.completed) > 0:
        costs.append(f"completed {undone:,} {'request' if undone == 1 else 'requests'} fewer")
    return ", ".join(parts) + (f"; but {' and '.join(costs)}" if costs else "")


def _slower(run: RunResult, baseline: RunResult) -> str:
    """What the clocks cost in latency: the p95 of the baseline and of the run; "" where all are the same."""
    pairs = [
        (name, text(getattr(baseline, field).p95), text(getattr(run, field).p95), unit)
        for name, field, text, unit in (
            ("TTFT", "ttft_s", seconds, "s"),
            ("TPOT", "tpot_s", milliseconds, "ms"),
            ("E2E", "e2e_s", seconds, "s"),
        )
    ]
    return ", ".join(f"{name} {was} -> {now} {unit}" for name, was, now, unit in pairs if was != now)


# ---- the list --------------------------------------------------------------------------------------------------


class Tone(StrEnum):
    """How a figure compares with its SLO or with the baseline."""

    PLAIN = "plain"
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure of a run. `header` is the terminal's (two lines), `title` the page's.

    The terminal always shows rank 0, and omits the highest ranks first. It has a table for each of `TABLES`.
    """

    group: str
    title: str
    header: str
    rank: int
    text: Callable[[RunResult, RunResult], str]
    tone: Callable[[RunResult, RunResult], Tone] = lambda *_: Tone.PLAIN


def _saved_tone(run: RunResult, baseline: RunResult) -> Tone:
    fraction = saved(run, baseline)
    if run is baseline or fraction is None or abs(fraction) < _SAME_ENERGY:
        return Tone.PLAIN
    return Tone.GOOD if fraction > 0 else Tone.BAD


def _gain_text(run: RunResult, baseline: RunResult) -> str:
    ratio = gain(run, baseline)
    return ABSENT if run is baseline or ratio is None else f"{ratio:.2f}x"


def _late(found: str, slo: str) -> Callable[[RunResult, RunResult], Tone]:
    """Whether the p99 of a quantity is within its SLO."""

    def tone(run: RunResult, _: RunResult) -> Tone:
        p99_s, limit_s = getattr(run, found).p99, getattr(run.slo, slo)
        if limit_s is None or p99_s is None:
            return Tone.PLAIN
        return Tone.BAD if p99_s > limit_s else Tone.GOOD

    return tone


def _estimate(run: RunResult) -> str:
    return ABSENT if run.saved_estimate is None else percent(run.saved_estimate).replace("-", "−")


def _energy(title: str, header: str, rank: int, text: Callable[[RunResult], str]) -> Metric:
    return Metric(group="Energy", title=title, header=header, rank=rank, text=lambda run, _: text(run))


def _latency(
    title: str,
    header: str,
    rank: int,
    text: Callable[[RunResult], str],
    tone: Callable[[RunResult, RunResult], Tone] = lambda *_: Tone.PLAIN,
) -> Metric:
    return Metric(group="Latency", title=title, header=header, rank=rank, text=lambda run, _: text(run), tone=tone)


def _count(title: str, header: str, rank: int, count: Callable[[RunResult], int], *, bad: bool = False) -> Metric:
    return Metric(
        group="Requests",
        title=title,
        header=header,
        rank=rank,
        text=lambda run, _: f"{count(run):,}",
        tone=lambda run, baseline: Tone.BAD if bad and count(run) > count(baseline) else Tone.PLAIN,
    )


def _projection(what: str, rank: int, of: Callable[[ProjectionError], float]) -> Metric:
    return Metric(
        group="Controller",
        title=f"Mean projection error of {what}, %",
        header=f"{what}\nerr %",
        rank=rank,
        text=lambda run, _: percent(None if run.projection_error is None else of(run.projection_error), decimals=2),
    )


GROUPS = ("Energy", "SLOs", "Latency", "Cost", "Requests", "Controller")
TABLES = (("Energy", "SLOs", "Requests", "Controller"), ("Latency",), ("Cost",))
"""Groups that share one table of the terminal."""
METRICS: tuple[Metric, ...] = (
    _energy("Energy, kJ", "energy\nkJ", 0, lambda run: kilojoules(run.energy_j)),
    Metric(
        group="Energy",
        title="Energy against the baseline, %",
        header="vs\nbase %",
        rank=0,
        text=lambda run, baseline: ABSENT if run is baseline else change(saved(run, baseline)),
        tone=_saved_tone,
    ),
    _energy("Energy while no request runs, kJ", "idle\nkJ", 13, lambda run: kilojoules(run.idle_energy_j)),
    _energy("Tokens per joule", "tok\n/J", 1, lambda run: f"{run.tokens_per_joule:.3f}"),
    Metric(
        group="Energy",
        title="Tokens per joule against the baseline",
        header="tok/J\ngain",
        rank=0,
        text=_gain_text,
        tone=_saved_tone,
    ),
    _energy("Saved (estimate) as a gateway would show it, %", "esti-\nmate %", 14, _estimate),
    _energy("Mean clock, MHz", "clock\nMHz", 1, lambda run: f"{run.mean_clock_mhz:.0f}"),
    _energy("Clock switches", "swit-\nches", 8, lambda run: f"{run.clock_switches:,}"),
    Metric(
        group="SLOs",
        title="SLO attainment, %",
        header="SLO\nmet %",
        rank=0,
        text=lambda run, _: percent(run.slo.attainment),
        tone=lambda run, baseline: Tone.PLAIN if slo_met(run, baseline) else Tone.BAD,
    ),
    Metric(
        group="SLOs",
        title="SLO attainment of served requests, %",
        header="of\nserved",
        rank=10,
        text=lambda run, _: percent(run.slo.completed_attainment),
    ),
    _latency("TTFT p50, s", "TTFT s\np50", 0, lambda run: seconds(run.ttft_s.p50)),
    _latency("TTFT p95, s", "\np95", 0, lambda run: seconds(run.ttft_s.p95)),
    _latency("TTFT p99, s", "\np99", 0, lambda run: seconds(run.ttft_s.p99), _late("ttft_s", "ttft_s")),
    _latency("TPOT p50, ms", "TPOT ms\np50", 0, lambda run: milliseconds(run.tpot_s.p50)),
    _latency("TPOT p95, ms", "\np95", 0, lambda run: milliseconds(run.tpot_s.p95)),
    _latency("TPOT p99, ms", "\np99", 0, lambda run: milliseconds(run.tpot_s.p99), _late("tpot_s", "tbt_s")),
    _latency("E2E p50, s", "E2E s\np50", 0, lambda run: seconds(run.e2e_s.p50)),
    _latency("E2E p95, s", "\np95", 0, lambda run: seconds(run.e2e_s.p95)),
    _latency("E2E p99, s", "\np99", 0, lambda run: seconds(run.e2e_s.p99), _late("e2e_s", "e2e_s")),
    _latency("TBT (single gaps) p99, ms", "TBT99\nms", 5, lambda run: milliseconds(run.tbt_s.p99)),
    _latency("Queue p99, s", "queue\np99 s", 12, lambda run: seconds(run.queue_s.p99)),
    _count("Completed", "\ndone", 7, lambda run: run.completed),
    _count("Rejected", "re-\nject", 2, lambda run: run.rejected, bad=True),
    _count("Completed, but marked lost", "\nlost", 4, lambda run: run.lost, bad=True),
    _count("Preemptions", "pre-\nempt", 11, lambda run: run.preemptions),
    _projection("batch", 14, lambda error: error.batch),
    _projection("KV", 15, lambda error: error.kv),
    Metric(
        group="Controller",
        title="One decision p99, ms",
        header="decide\np99 ms",
        rank=16,
        text=lambda run, _: ABSENT if run.decision_s.p99 is None else f"{run.decision_s.p99 * 1e3:.2f}",
    ),
)


def metrics(options: CostOptions) -> tuple[Metric, ...]:
    """Every metric, with the cost by these factors."""

    def of(title: str, header: str, rank: int, value: Callable[[Cost], float | None]) -> Metric:
        return Metric(
            group="Cost",
            title=title,
            header=header,
            rank=rank,
            text=lambda run, baseline: amount(value(cost(run, options, baseline))),
        )

    money = options.currency
    costs = (
        of("Energy, kWh", "\nkWh", 0, lambda of: of.kwh),
        of("CO2, kg", "CO2\nkg", 0, lambda of: of.co2_kg),
        of(f"Cost, {money}", f"cost\n{money}", 0, lambda of: of.price),
        of("kWh per million generated tokens", "kWh\n/M tok", 2, lambda of: of.kwh_per_million_tokens),
        of("g CO2 per million generated tokens", "g CO2\n/M tok", 3, lambda of: of.co2_g_per_million_tokens),
        of(f"{money} per million generated tokens", f"{money}\n/M tok", 2, lambda of: of.price_per_million_tokens),
        of("kWh per year of this load", "kWh\n/year", 1, lambda of: of.kwh_per_year),
        of("kg CO2 per year of this load", "kg CO2\n/year", 1, lambda of: of.co2_kg_per_year),
        of(f"{money} per year of this load", f"{money}\n/year", 1, lambda of: of.price_per_year),
    )
    return (*METRICS, *costs)
