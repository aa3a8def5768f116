"""The plots of the report, in the order of the page; here the two that compare the policies row by row.

Those over time are in timelines.py, distributions in distributions.py, axes and colours in figure.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from throttllem.report.distributions import gap_plot, latency_plot, pace_plot
from throttllem.report.figure import BOTTOM_PX, TOP_PX, Json, Plot, axis, label, layout, note, shorten
from throttllem.report.palette import token
from throttllem.report.quantity import change, kilojoules, percent
from throttllem.report.timelines import batch_plot, clock_plot, kv_plot, power_plot, size_plot
from throttllem.report.verdict import baseline_of, saved
from throttllem.sim.result import RunResult, SloOutcome

_ROW_PX = 62
_LABEL_PX = 13
"""From the middle of a bar to the foot of its label."""


def all_plots(runs: Sequence[RunResult]) -> list[Plot]:
    """Every plot that these runs have something to show for, in the order of the page.

    Two and two belong together and share a height; one that is left without its partner has the row for itself.
    """
    pairs = [
        (energy_plot(runs), attainment_plot(runs)),
        (clock_plot(runs), power_plot(runs)),
        (latency_plot(runs), pace_plot(runs)),
        (gap_plot(runs), size_plot(runs)),
        (batch_plot(runs), kv_plot(runs)),
    ]
    plots = []
    for pair in pairs:
        drawn = [plot for plot in pair if plot is not None]
        height_px = max((plot.height_px for plot in drawn), default=0)
        plots += [replace(plot, height_px=height_px, wide=len(drawn) == 1) for plot in drawn]
    return plots


def energy_plot(runs: Sequence[RunResult]) -> Plot:
    """Energy by policy, at work and idle stacked, with what was saved."""
    baseline = baseline_of(runs)
    texts = [f"{kilojoules(run.energy_j)} kJ" + _change(run, baseline) for run in runs]
    idle = [run.idle_energy_j / 1e3 for run in runs]
    work = [(run.energy_j - run.idle_energy_j) / 1e3 for run in runs]
    colours = [token(index) for index in range(len(runs))]
    pattern = {"shape": "/", "bgcolor": "@card", "fillmode": "replace", "size": 5, "solidity": 0.5}
    data = [
        _bars("serving", work, {"color": colours}, "%{x:,.1f} kJ serving<extra></extra>"),
        _bars("idle", idle, {"color": colours, "pattern": pattern}, "%{x:,.1f} kJ idle<extra></extra>"),
    ]
    notes = [_row_note(place, run, text) for place, (run, text) in enumerate(zip(runs, texts, strict=True))]
    return Plot(
        key="energy",
        title="Energy by policy",
        caption="Every GPU of every engine that is up. The hatched part was drawn while no request was running.",
        summary="; ".join(f"{run.policy} {text}" for run, text in zip(runs, texts, strict=True)),
        height_px=_rows_px(runs),
        data=data,
        layout=_rows_layout(runs, notes, axis("kJ", rangemode="tozero"), barmode="stack", bargap=0.62),
    )


def attainment_plot(runs: Sequence[RunResult]) -> Plot:
    """Fraction of all requests that met every SLO, and each of them, by policy."""
    baseline = baseline_of(runs)
    marks = _marks(baseline.slo)
    at = baseline.slo.attainment * 100
    worst = min(met(run.slo) for met, *_ in marks for run in runs) * 100
    low = max(0.0, min(95.0, worst - 0.08 * (100 - worst) - 0.5))
    notes = [_row_note(place, run, f"{percent(run.slo.attainment)} %") for place, run in enumerate(runs)]
    edge = {"color": "@soft", "width": 1.5, "dash": "dot"}
    shapes = [{"type": "line", "xref": "x", "yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1, "line": edge}]
    return Plot(
        key="attainment",
        title="Promises kept by policy",
        caption=f"Of all requests; a rejected one counts as missed. The dotted line is {baseline.policy}. "
        "The axis does not start at zero.",
        summary="; ".join(f"{run.policy} {percent(run.slo.attainment)} %" for run in runs),
        height_px=_rows_px(runs),
        data=[_dots(runs, *mark) for mark in marks],
        layout=_rows_layout(runs, notes, axis("% of requests", range=[low, 100.4]), shapes=shapes),
    )


_Met = Callable[[SloOutcome], float]


def _marks(slo: SloOutcome) -> list[tuple[_Met, str, str, int]]:
    """What is drawn of attainment: the fraction, its name, the marker and its size in pixels."""
    marks: list[tuple[_Met, str, str, int]] = [(lambda met: met.attainment, "every SLO", "circle", 15)]
    if slo.e2e_s is not None:
        marks.append((lambda met: met.e2e_attainment, "E2E", "diamond-open", 10))
    if slo.tbt_s is not None:
        marks.append((lambda met: met.tbt_attainment, "mean TBT", "square-open", 10))
    if slo.ttft_s is not None:
        marks.append((lambda met: met.ttft_attainment, "TTFT", "triangle-up-open", 10))
    return marks


def _dots(runs: Sequence[RunResult], met: _Met, name: str, symbol: str, size_px: int) -> Json:
    colours = [token(index) for index in range(len(runs))]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": shorten([met(run.slo) * 100 for run in runs]),
        "y": list(range(len(runs))),
        "marker": {"symbol": symbol, "size": size_px, "color": colours, "line": {"width": 2, "color": colours}},
        "hovertemplate": f"%{{x:.2f}} % of the requests met {name}<extra></extra>",
        "cliponaxis": False,
    }


def _change(run: RunResult, baseline: RunResult) -> str:
    return "" if run is baseline else f", {change(saved(run, baseline))} %"


def _bars(name: str, values: list[float], marker: Json, hover: str) -> Json:
    rows = list(range(len(values)))
    where = {"type": "bar", "orientation": "h", "name": name, "x": shorten(values), "y": rows}
    return {**where, "marker": {**marker, "line": {"width": 0}}, "hovertemplate": hover}


def _row_note(place: int, run: RunResult, text: str) -> Json:
    written = f"<b>{label(run.policy)}</b>  {text}"
    return note(written, x=0, y=place, xref="paper", yref="y", xanchor="left", yanchor="bottom", yshift=_LABEL_PX)


def _rows_px(runs: Sequence[RunResult]) -> int:
    return _ROW_PX * len(runs) + TOP_PX + BOTTOM_PX


def _rows_layout(runs: Sequence[RunResult], notes: list[Json], x_axis: Json, **settings: object) -> Json:
    """One row for each policy, the first on top, its label above its marks (so that a phone has the whole width)."""
    rows = axis(range=[len(runs) - 0.6, -0.75], showticklabels=False, showgrid=False, zeroline=False, fixedrange=True)
    return layout(xaxis=x_axis, yaxis=rows, annotations=notes, showlegend=True, hovermode="closest", **settings)
