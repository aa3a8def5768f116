"""The terminal's table of results: one row per policy, as many figures as the width allows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from throttllem.report.metric import METRICS, Metric, Tone
from throttllem.report.quantity import promises
from throttllem.report.verdict import baseline_of
from throttllem.sim.result import RunResult

_STYLE = {Tone.PLAIN: "", Tone.GOOD: "green", Tone.BAD: "bold red"}


def results_table(runs: Sequence[RunResult], *, width: int = 100) -> Table:
    """One row per policy, as many figures as fit `width` columns; what is left out is named under the table."""
    baseline = baseline_of(runs)
    shown = [metric for metric in METRICS if metric.rank == 0]
    for metric in sorted((metric for metric in METRICS if metric.rank > 0), key=lambda metric: metric.rank):
        wider = [other for other in METRICS if other in shown or other is metric]
        if _width(_build(runs, baseline, wider, width)) > width:
            break
        shown = wider
    table = _build(runs, baseline, shown, width)
    left_out = [
        metric.header.replace("-\n", "").replace("\n", " ").strip() for metric in METRICS if metric not in shown
    ]
    note = f"SLO: {promises(baseline.slo)}. Energy includes idle."
    table.caption = Text(note + (f" No room for: {', '.join(left_out)}." if left_out else ""), style="dim")
    return table


def _width(table: Table) -> int:
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum


def _build(runs: Sequence[RunResult], baseline: RunResult, metrics: Sequence[Metric], width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.add_column("\npolicy", no_wrap=True)
    for metric in metrics:
        table.add_column(metric.header, justify="right", no_wrap=True)
    for run in runs:
        # A narrow terminal has no room for "least-energy+autoscale" on one line.
        name = run.policy.replace("+", "\n+") if width < 100 else run.policy
        style = "bold" if run is baseline else ""
        cells = [Text(metric.text(run, baseline), style=_STYLE[metric.tone(run, baseline)]) for metric in metrics]
        table.add_row(Text(name, style=style), *cells)
    return table
