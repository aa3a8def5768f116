"""The output of a simulation on a terminal (a table and sentences), and its JSON contract."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from throttllem.report.metrics import METRICS, Metric, Tone, baseline_of, slos, verdict
from throttllem.sim.result import RunResult

_STYLE = {Tone.PLAIN: "", Tone.GOOD: "green", Tone.BAD: "bold red"}
_NOTEWORTHY = 0.005
_VERSIONS = ("throttllem", "numpy", "lightgbm")


def results_json(scenario: Mapping[str, object], runs: Sequence[RunResult]) -> dict[str, object]:
    """Schema 1 of the contract: every input, resolved, and the runs in order."""
    versions = {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()}
    return {"schema": 1, "scenario": {**scenario, "versions": versions}, "runs": [run.to_json() for run in runs]}


def show_results(scenario: Mapping[str, Any], runs: Sequence[RunResult], console: Console | None = None) -> None:
    """Print the table, a sentence for each policy, the reasons of rejections, and what the simulation rests on."""
    console = console or Console()
    console.print(results_table(runs, width=console.width))
    baseline = baseline_of(runs)
    for run in runs:
        if run is not baseline:
            console.print(verdict(run, baseline), highlight=False)
    batching = f"Simulated engine: batches as {scenario['batching']}."
    for line in (*_rejections(runs), batching, _basis(scenario, runs)):
        console.print(line, highlight=False)


def results_table(runs: Sequence[RunResult], *, width: int = 100) -> Table:
    """One row per policy, as many figures as fit `width` columns; the caption names those omitted."""
    baseline = baseline_of(runs)
    shown = [metric for metric in METRICS if metric.rank == 0]
    for metric in sorted((metric for metric in METRICS if metric.rank > 0), key=lambda metric: metric.rank):
        wider = [other for other in METRICS if other in shown or other is metric]
        if _width(_table(runs, baseline, wider, width)) > width:
            break
        shown = wider
    table = _table(runs, baseline, shown, width)
    omitted = [each.header.replace("-\n", "").replace("\n", " ").strip() for each in METRICS if each not in shown]
    note = f"SLO: {slos(baseline.slo)}. Energy includes idle."
    table.caption = Text(note + (f" No room for: {', '.join(omitted)}." if omitted else ""), style="dim")
    return table


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


def _basis(scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> str:
    """Whether the largest engine's seconds and watts are measured, calibrated or modelled, and for how much of the
    time each run was outside the range in which that holds.
    """
    engine = scenario["engines"][-1]
    parts = []
    for figure, reach in engine["physics"].items():
        low, high = reach["clocks_mhz"]
        outside = {run.policy: _share_outside(run, low, high) for run in runs}
        ran = ", ".join(f"{share:.0%} of {policy}'s time" for policy, share in outside.items() if share >= _NOTEWORTHY)
        limits = [
            *([f"modelled for {ran}"] if ran else []),
            *([f"below the top clock modelled: {reach['below_top']}"] if reach["below_top"] else []),
        ]
        if reach["why"]:
            parts.append(f"{figure} modelled, not measured ({reach['why']})")
        else:
            note = f" ({'; '.join(limits)})" if limits else ""
            parts.append(f"{figure} {reach['kind']} from {low} to {high} MHz{note}")
    return f"Simulated GPU, TP {engine['tp']}: {'; '.join(parts)}."


def _share_outside(run: RunResult, low_mhz: int, high_mhz: int) -> float:
    """Fraction of the time of a run's iterations at clocks outside that range."""
    busy_s = sum(run.busy_s_by_mhz.values())
    outside_s = sum(seconds for mhz, seconds in run.busy_s_by_mhz.items() if not low_mhz <= mhz <= high_mhz)
    return outside_s / busy_s if busy_s else 0.0
