"""The tables of the document: measured, against the simulation, savings, costs, and what the runs rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import NamedTuple

from tools.evaluation.section import Table
from tools.loop.found import Found
from tools.loop.outcome import Figures, saving
from tools.loop.plan import BASELINE, OURS


class Column(NamedTuple):
    """A figure in a table. `scale` and `form` make its text; `relative`: a difference is in %, else in its unit."""

    title: str
    read: Callable[[Figures], float]
    scale: float
    form: str
    relative: bool = True

    def text(self, value: float) -> str:
        """The figure."""
        return self.form.format(value * self.scale)

    def difference(self, of: float, to: float) -> str:
        """How far it is from another."""
        if self.relative:
            return f"{of / to - 1:+.1%}"
        return ("-" if of < to else "+") + self.text(abs(of - to))


COLUMNS = (
    Column("energy, kJ", lambda one: one.energy_j, 1e-3, "{:.2f}"),
    Column("tokens/J", lambda one: one.tokens_per_j, 1, "{:.3f}"),
    Column("TTFT p50, ms", lambda one: one.ttft_p50_s, 1e3, "{:,.0f}", relative=False),
    Column("TTFT p99, ms", lambda one: one.ttft_p99_s, 1e3, "{:,.0f}", relative=False),
    Column("ITL mean, ms", lambda one: one.itl_mean_s, 1e3, "{:.1f}"),
    Column("E2E p50, s", lambda one: one.e2e_p50_s, 1, "{:.2f}"),
    Column("E2E p99, s", lambda one: one.e2e_p99_s, 1, "{:.2f}"),
    Column("kept both, %", lambda one: one.attainment, 1e2, "{:.1f}", relative=False),
    Column("clock, MHz", lambda one: one.clock_mhz, 1, "{:,.0f}", relative=False),
)
HEAD = tuple(column.title for column in COLUMNS)


def measured_table(found: Found) -> Table:
    """Medians over the rounds, with the least and the most."""
    rows = []
    for policy in found.plan.policies:
        runs = found.of(policy)
        rows.append((policy, *(_ranged(column, [column.read(run.figures) for run in runs]) for column in COLUMNS)))
    caption = f"Measured: medians of {found.plan.rounds} rounds (least to most); latencies and promises by the client"
    return Table(caption=caption, head=("policy", *HEAD), rows=rows)


def compared_table(found: Found) -> Table:
    """Measured, simulated, and how far they are apart."""
    rows = []
    for policy in found.simulated:
        live = found.middle(policy)
        rows.append((policy, "measured", *(column.text(column.read(live)) for column in COLUMNS)))
        for title, simulation in (("simulated", found.simulated), ("with the gateway's table", found.informed)):
            virtual = simulation[policy]
            rows.append(("", title, *(column.text(column.read(virtual)) for column in COLUMNS)))
            apart = (column.difference(column.read(live), column.read(virtual)) for column in COLUMNS)
            rows.append(("", "measured is", *apart))
    caption = "Measured against `throttllem simulate` on the same requests, energy of the same window"
    return Table(caption=caption, head=("policy", "", *HEAD), rows=rows)


def saving_table(found: Found) -> Table:
    """What each policy saves against the top clock: measured, simulated, and what `advise` foretold."""
    rows = []
    for policy in found.plan.policies:
        if policy == BASELINE or BASELINE not in found.plan.policies:
            continue
        live = saving(found.middle(policy), found.middle(BASELINE))
        virtual = saving(found.simulated[policy], found.simulated[BASELINE]) if found.simulated else None
        advice = found.advice() if policy == OURS else None
        foretold = "" if advice is None else f"{advice.advised:.1%}"
        rows.append((policy, f"{live:.1%}", "" if virtual is None else f"{virtual:.1%}", foretold))
    head = ("policy", "measured", "simulated", "foretold by a run that only advised")
    return Table(caption=f"Energy saved against `{BASELINE}`", head=head, rows=rows)


def cost_table(found: Found) -> Table:
    """What the control costs, by policy."""
    rows = []
    for policy in found.plan.policies:
        costs = [run.cost for run in found.of(policy)]
        rows.append(
            (
                policy,
                f"{median(cost.commands for cost in costs):,.0f}",
                _milliseconds(cost.command_p50_s for cost in costs),
                _milliseconds(cost.command_p99_s for cost in costs),
                f"{median(cost.decisions for cost in costs):,.0f}",
                _milliseconds(cost.decision_p50_s for cost in costs),
                _milliseconds(cost.decision_p99_s for cost in costs),
                f"{median(cost.gateway_share for cost in costs):.1%}",
                f"{median(cost.keeper_share for cost in costs):.1%}",
            )
        )
    head = (
        *("policy", "clock commands", "event to command p50, ms", "p99, ms"),
        *("decisions", "decision p50, ms", "p99, ms", "gateway, of a core", "keeper, of a core"),
    )
    caption = "What the control costs: medians over the rounds, percentiles within the buckets of the gateway's metrics"
    return Table(caption=caption, head=head, rows=rows)


def trust_table(found: Found) -> Table:
    """What the runs rest on, each on its own."""
    rows = [
        (
            f"{run.policy}{'' if run.clocks == 'on' else ', advised'}",
            str(run.round + 1),
            f"{run.answered} of {run.requests}",
            f"{run.trust.steps:,}",
            f"{run.trust.overruns:.2%}",
            f"{run.trust.real_share:.0%}",
            f"{run.trust.host_share:.0%}",
            f"{run.figures.energy_j / 1e3:.2f}",
            "" if run.trust.aiperf_j is None else f"{run.trust.aiperf_j / 1e3:.2f}",
            f"{run.trust.hook_j / 1e3:.2f}",
            f"{run.trust.freed_s * 1e3:.0f}",
            f"{run.trust.load:.1f}",
        )
        for run in found.runs
    ]
    head = (
        *("run", "round", "answered", "steps", "overruns", "vLLM computes", "its host takes", "NVML, kJ", "aiperf, kJ"),
        *("steps alone, kJ", "GPU free after, ms", "load"),
    )
    caption = (
        "What the runs rest on. *Overruns*: steps that took this machine longer than the modelled GPU. *vLLM "
        "computes*, *its host takes*: shares of the steps' time, hidden in it. *aiperf*: what its telemetry counted "
        "between its first and its last request. *GPU free after*: from the gateway's end to the end of its lock."
    )
    return Table(caption=caption, head=head, rows=rows)


def _ranged(column: Column, values: Sequence[float]) -> str:
    texts = [column.text(value) for value in (median(values), min(values), max(values))]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _milliseconds(values: Iterable[float | None]) -> str:
    seconds = [value for value in values if value is not None]
    return f"{median(seconds) * 1e3:.2f}" if seconds else ""
