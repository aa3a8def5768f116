"""The plots of the report in the order of the page: policies compared row by row, and over time in strips.

Distributions are in distributions.py, the common style in figure.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from throttllem.report.distributions import gap_plot, latency_plot, tpot_plot
from throttllem.report.figure import BOTTOM_PX, TOP_PX, Line, Plot, lines_of, new_figure, short, summary
from throttllem.report.metrics import baseline_of, change, kilojoules, percent, saved
from throttllem.report.palette import CARD, SOFT, TEXT
from throttllem.sim.result import ProjectionError, RunResult, Series, SloOutcome

_ROW_PX, _STRIP_PX, _GAP_PX = 62, 84, 34
_Met = Callable[[SloOutcome], float]


def all_plots(runs: Sequence[RunResult]) -> list[Plot]:
    """Every plot that these runs have data for. Two plots share a row and its height; a single one is `wide`."""
    baseline, lines = baseline_of(runs), lines_of(runs)
    rows = [
        (_energy(lines, baseline), _attainment(lines, baseline)),
        (_clock(lines), _power(lines)),
        (latency_plot(lines, baseline.slo), tpot_plot(lines, baseline.slo)),
        (gap_plot(lines), _sizes(lines)),
        (_batch(lines), _kv(lines)),
    ]
    plots = []
    for row in rows:
        drawn = [plot for plot in row if plot is not None]
        height_px = max((plot.figure.layout.height for plot in drawn), default=0)
        for plot in drawn:
            plot.figure.update_layout(height=height_px)
            plots.append(replace(plot, wide=len(drawn) == 1))
    return plots


# ---- policies compared, one row each -----------------------------------------------------------------------------


def _energy(lines: Sequence[Line], baseline: RunResult) -> Plot:
    """Energy by policy, serving and idle stacked, with the saving."""
    hatch = {"shape": "/", "bgcolor": CARD.light, "fillmode": "replace", "size": 5, "solidity": 0.5}
    parts: tuple[tuple[str, list[float], dict[str, Any]], ...] = (
        ("serving", [line.run.energy_j - line.run.idle_energy_j for line in lines], {}),
        ("idle", [line.run.idle_energy_j for line in lines], {"pattern": hatch}),
    )
    bars = [
        go.Bar(
            name=name,
            x=short([value / 1e3 for value in joules]),
            y=list(range(len(lines))),
            orientation="h",
            marker={"color": [line.colour for line in lines], "line": {"width": 0}, **marker},
            hovertemplate=f"%{{x:,.1f}} kJ {name}<extra></extra>",
        )
        for name, joules, marker in parts
    ]
    texts = [
        f"{kilojoules(run.energy_j)} kJ" + ("" if run is baseline else f", {change(saved(run, baseline))} %")
        for run in (line.run for line in lines)
    ]
    figure = _rows(bars, lines, texts, barmode="stack", bargap=0.62)
    figure.update_xaxes(title_text="kJ", rangemode="tozero")
    return Plot(
        key="energy",
        title="Energy by policy",
        caption="Every GPU of every engine that is up. The hatched part was drawn while no request was running.",
        summary=summary(lines, texts),
        figure=figure,
    )


def _attainment(lines: Sequence[Line], baseline: RunResult) -> Plot:
    """Fraction of all requests that met every SLO, and each of them, by policy."""
    slo = baseline.slo
    marks: list[tuple[float | None, str, _Met, str, int]] = [
        (0.0, "every SLO", lambda met: met.attainment, "circle", 15),
        (slo.e2e_s, "E2E", lambda met: met.e2e_attainment, "diamond-open", 10),
        (slo.tbt_s, "mean TBT", lambda met: met.tbt_attainment, "square-open", 10),
        (slo.ttft_s, "TTFT", lambda met: met.ttft_attainment, "triangle-up-open", 10),
    ]
    marks = [mark for mark in marks if mark[0] is not None]
    colours = [line.colour for line in lines]
    dots = [
        go.Scatter(
            name=name,
            mode="markers",
            x=short([met(line.run.slo) * 100 for line in lines]),
            y=list(range(len(lines))),
            marker={"symbol": symbol, "size": size_px, "color": colours, "line": {"width": 2, "color": colours}},
            hovertemplate=f"%{{x:.2f}} % of the requests met {name}<extra></extra>",
            cliponaxis=False,
        )
        for _, name, met, symbol, size_px in marks
    ]
    texts = [f"{percent(line.run.slo.attainment)} %" for line in lines]
    figure = _rows(dots, lines, texts)
    worst = min(met(line.run.slo) for _, _, met, *_ in marks for line in lines) * 100
    low = max(0.0, min(95.0, worst - 0.08 * (100 - worst) - 0.5))
    figure.update_xaxes(title_text="% of requests", range=[low, 100.4])
    figure.add_vline(slo.attainment * 100, line={"color": SOFT.light, "width": 1.5, "dash": "dot"})
    return Plot(
        key="attainment",
        title="SLOs met by policy",
        caption=f"Of all requests; a rejected one violates its SLOs. The dotted line is {baseline.policy}. "
        "The axis does not start at zero.",
        summary=summary(lines, texts),
        figure=figure,
    )


def _rows(traces: Sequence[Any], lines: Sequence[Line], texts: Sequence[str], **layout: Any) -> go.Figure:
    """One row per policy, the first on top, its label above its marks (so a phone has the whole width)."""
    height_px = _ROW_PX * len(lines) + TOP_PX + BOTTOM_PX
    figure = new_figure(traces, height_px, showlegend=True, hovermode="closest", **layout)
    span = [len(lines) - 0.6, -0.75]
    figure.update_yaxes(range=span, showticklabels=False, showgrid=False, zeroline=False, fixedrange=True)
    where = {"x": 0, "xref": "paper", "xanchor": "left", "yanchor": "bottom", "yshift": 13}
    for place, (line, text) in enumerate(zip(lines, texts, strict=True)):
        figure.add_annotation(text=line.heading(text), y=place, **where)
    return figure


# ---- over time, a strip for each policy --------------------------------------------------------------------------


def _clock(lines: Sequence[Line]) -> Plot | None:
    return _over_time(
        lines,
        lambda series: series.clock_mhz,
        lambda run: f"mean {run.mean_clock_mhz:.0f} MHz",
        key="clock",
        title="GPU clock over time, MHz",
        caption="The engine that takes new requests; each point is the mean of one bin. Gaps: no engine was up.",
        from_zero=False,
    )


def _power(lines: Sequence[Line]) -> Plot | None:
    return _over_time(
        lines,
        lambda series: series.power_w,
        lambda run: f"mean {run.energy_j / run.duration_s:,.0f} W" if run.duration_s > 0 else "",
        key="power",
        title="Power over time, watts",
        caption="All GPUs that count, shadow engines included. The area under each curve is its energy.",
    )


def _sizes(lines: Sequence[Line]) -> Plot | None:
    return _over_time(
        [line for line in lines if len({size for size in line.run.series.tp if size is not None}) > 1],
        lambda series: series.tp,
        lambda run: f"{max(0, len(run.engines or run.sizes) - 1)} changes of engine",
        key="size",
        title="GPUs up over time",
        caption="Engines that take requests, drain or start up; a spike is an old and a new engine side by side. "
        "Policies that keep one size are not shown.",
    )


def _over_time(
    lines: Sequence[Line],
    values_of: Callable[[Series], Sequence[float | None]],
    text_of: Callable[[RunResult], str],
    *,
    key: str,
    title: str,
    caption: str,
    from_zero: bool = True,
) -> Plot | None:
    """One series of each policy; None where there is no value."""
    series = [short(values_of(line.run.series)) for line in lines]
    seen = [value for values in series for value in values if value is not None]
    if not seen:
        return None
    # Not dashed: each strip holds one policy, and a dash hides short swings.
    strips = [
        [
            go.Scatter(
                name=line.name,
                mode="lines",
                x=line.time,
                y=values,
                line={"color": line.colour, "width": 1.4, "shape": "hv"},
                fill="tozeroy" if from_zero else None,
            )
        ]
        for line, values in zip(lines, series, strict=True)
    ]
    texts = [text_of(line.run) for line in lines]
    figure = _strips(strips, lines, texts)
    low = 0.0 if from_zero else min(seen)
    room = 0.06 * (max(seen) - low) or 0.06 * max(seen) or 1.0
    figure.update_yaxes(range=[low if from_zero else low - room, max(seen) + room])
    return Plot(key=key, title=title, caption=caption, summary=summary(lines, texts), figure=figure)


def _batch(lines: Sequence[Line]) -> Plot | None:
    return _projected(
        lines,
        lambda series: (series.batch, series.batch_projected),
        lambda error: error.batch,
        key="batch",
        title="Batch size, projected against actual",
    )


def _kv(lines: Sequence[Line]) -> Plot | None:
    return _projected(
        lines,
        lambda series: (series.kv_blocks, series.kv_projected),
        lambda error: error.kv,
        key="kv",
        title="KV blocks in use, projected against actual",
    )


def _projected(
    lines: Sequence[Line],
    both: Callable[[Series], tuple[Sequence[float | None], Sequence[float | None]]],
    error_of: Callable[[ProjectionError], float],
    *,
    key: str,
    title: str,
) -> Plot | None:
    """Actual and projected values of the policies that project; None where none does."""
    lines = [line for line in lines if any(value is not None for value in both(line.run.series)[1])]
    if not lines:
        return None
    strips: list[list[go.Scatter]] = []
    for line in lines:
        actual, projected = (short(values) for values in both(line.run.series))
        common = {"mode": "lines", "x": line.time, "showlegend": not strips}
        below = go.Scatter(
            name="actual",
            legendgroup="actual",
            y=actual,
            line={"color": line.colour, "width": 0},
            fill="tozeroy",
            **common,
        )
        above = go.Scatter(
            name="projected", legendgroup="projected", y=projected, line={"color": TEXT.light, "width": 1.1}, **common
        )
        strips.append([below, above])
    texts = [
        f"mean error {percent(None if error is None else error_of(error), decimals=2)} %"
        for error in (line.run.projection_error for line in lines)
    ]
    figure = _strips(strips, lines, texts)
    highest = max(value for strip in strips for trace in strip for value in trace.y if value is not None)
    figure.update_yaxes(range=[0, highest * 1.06 or 1.0])
    height_px = figure.layout.height
    # The legend goes above the first heading.
    figure.update_layout(showlegend=True, legend_y=1 + 20 / (height_px - TOP_PX - BOTTOM_PX))
    figure.update_layout(height=height_px + 20, margin_t=TOP_PX + 20)
    return Plot(
        key=key,
        title=title,
        caption="Means of each bin; the error is over all iterations. Policies that do not project are not shown.",
        summary=summary(lines, texts),
        figure=figure,
    )


def _strips(strips: Sequence[Sequence[go.Scatter]], lines: Sequence[Line], texts: Sequence[str]) -> go.Figure:
    """Strips one above the other over one x axis, each under a heading."""
    rows = len(strips)
    plot_px = rows * _STRIP_PX + (rows - 1) * _GAP_PX
    headings = [line.heading(text) for line, text in zip(lines, texts, strict=True)]
    figure = new_figure([], plot_px + TOP_PX + BOTTOM_PX, hovermode="x")
    make_subplots(rows=rows, cols=1, vertical_spacing=_GAP_PX / plot_px, subplot_titles=headings, figure=figure)
    figure.update_annotations(x=0, xanchor="left", font={"size": 12})
    figure.update_xaxes(visible=False)
    figure.update_yaxes(nticks=5)
    figure.update_xaxes(visible=True, title_text=lines[0].unit, rangemode="tozero", row=rows, col=1)
    # All on the x axis of the last strip, so that hovering reads every strip.
    x = figure.get_subplot(row=rows, col=1).xaxis.plotly_name.replace("axis", "")
    for place, strip in enumerate(strips):
        figure.add_traces([trace.update(xaxis=x, yaxis=f"y{place + 1}") for trace in strip])
    return figure
