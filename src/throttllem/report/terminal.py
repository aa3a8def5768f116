"""The output of a simulation on a terminal (tables and sentences), and its JSON contract."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from throttllem.config import CostOptions
from throttllem.report.basis import assumed_slos, certainty, dearer, headline, lengths, physics
from throttllem.report.certainty import saving_interval
from throttllem.report.cost import cost, cost_options, factors
from throttllem.report.metrics import TABLES, Metric, Tone, baseline_of, metrics, saved, slos, verdict
from throttllem.sim.result import RunResult

_STYLE = {Tone.PLAIN: "", Tone.GOOD: "green", Tone.BAD: "bold red"}
NAMES = (
    "triton: always the maximum clock (the paper's baseline, whatever the engine). "
    "lost: could no longer meet its deadline, served all the same."
)
_VERSIONS = ("throttllem", "numpy", "lightgbm")


def results_json(scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> dict[str, object]:
    """Schema 1 of the contract: what the figures rest on, every input, resolved, and the runs in order."""
    versions = {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()}
    options = cost_options(scenario)
    baseline = baseline_of(runs)
    return {
        "schema": 1,
        "basis": {
            "figures": "simulated",
            "statement": headline(scenario),
            "slos": assumed_slos(scenario),
            "lengths": scenario["options"]["length"]["predictor"],
            "physics": physics(scenario, runs),
            "certainty": certainty(scenario, runs),
            "warnings": dearer(runs),
        },
        "scenario": {**scenario, "versions": versions},
        "runs": [
            run.to_json() | _compared(run, baseline) | {"cost": asdict(cost(run, options, baseline))} for run in runs
        ],
    }


def _compared(run: RunResult, baseline: RunResult) -> dict[str, object]:
    """The saving against the baseline as a fraction, and half of its 95 % interval."""
    if run is baseline:
        return {"saved": None, "saved_interval": None}
    interval = saving_interval(run, baseline)
    return {"saved": saved(run, baseline), "saved_interval": interval[0] if interval else None}


def show_results(scenario: Mapping[str, Any], runs: Sequence[RunResult], console: Console | None = None) -> None:
    """Print what the figures rest on, the tables, a sentence for each policy, how certain that is, the reasons of
    rejections, and the basis of the simulated GPU.
    """
    console = console or Console()
    console.print(headline(scenario), style="bold", highlight=False)
    options = cost_options(scenario)
    for table in results_tables(runs, options, width=console.width):
        console.print(table)
    baseline = baseline_of(runs)
    if assumed := assumed_slos(scenario):
        console.print(assumed, highlight=False)
    for run in runs:
        if run is not baseline:
            console.print(verdict(run, baseline), highlight=False)
    for warning in dearer(runs):
        console.print(warning, style="bold red", highlight=False)
    batching = f"Simulated engine: batches as {scenario['batching']}."
    for line in (certainty(scenario, runs), factors(options), *_rejections(runs), batching, *_basis(scenario, runs)):
        console.print(line, highlight=False)


def beside(scenario: Mapping[str, Any], run: RunResult, runs: Sequence[RunResult]) -> str:
    """One line for a run under another prediction of output lengths, compared with the same baseline."""
    return f"Output lengths {lengths(scenario)}: {verdict(run, baseline_of(runs))}"


def results_tables(runs: Sequence[RunResult], options: CostOptions, *, width: int = 100) -> list[Table]:
    """Energy, latency and cost: one row per policy, as many figures as fit `width` columns; the last caption names
    those omitted.
    """
    baseline, every = baseline_of(runs), metrics(options)
    tables, omitted = [], []
    for groups in TABLES:
        here = [metric for metric in every if metric.group in groups]
        shown = [metric for metric in here if metric.rank == 0]
        for metric in sorted((metric for metric in here if metric.rank > 0), key=lambda metric: metric.rank):
            wider = [other for other in here if other in shown or other is metric]
            if _width(_table(runs, baseline, wider, width)) > width:
                break
            shown = wider
        tables.append(_table(runs, baseline, shown, width))
        omitted += [each.title for each in here if each not in shown]
    note = f"SLO: {slos(baseline.slo)}. Energy includes idle. {NAMES}"
    tables[-1].caption = Text(note + (f" Left out for width: {'; '.join(omitted)}." if omitted else ""), style="dim")
    return tables


def _width(table: Table) -> int:
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum


def _table(runs: Sequence[RunResult], baseline: RunResult, metrics: Sequence[Metric], width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.add_column("\npolicy", no_wrap=True)
    for metric in metrics:
        table.add_column(metric.header, justify="right", no_wrap=True)
    for run in runs:
        # A narrow terminal has no room for "least-energy+autoscale" on one line.
        name = run.policy.replace("+", "\n+") if width < 100 else run.policy
        cells = [Text(metric.text(run, baseline), style=_STYLE[metric.tone(run, baseline)]) for metric in metrics]
        table.add_row(Text(name, style="bold" if run is baseline else ""), *cells)
    return table


def _rejections(runs: Sequence[RunResult]) -> Iterator[str]:
    """How many requests were rejected for each reason, by policy where policies differ."""
    for reason in dict.fromkeys(reason for run in runs for reason in run.rejections):
        counts = {run.policy: run.rejections.get(reason, 0) for run in runs}
        each = "" if len(set(counts.values())) == 1 else ": " + ", ".join(f"{name} {n}" for name, n in counts.items())
        yield f"{max(counts.values())} of {runs[0].requests} requests were rejected: {reason}{each}"


def _basis(scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> Iterator[str]:
    if parts := physics(scenario, runs):
        yield f"Simulated GPU, TP {scenario['engines'][-1]['tp']}: {'; '.join(parts)}."
