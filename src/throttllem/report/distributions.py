"""Distributions of the report: the fraction of requests within a time, with the SLO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import isfinite, log10

from plotly import graph_objects as go

from throttllem.report.figure import Line, Plot, dash, new_figure, short, summary
from throttllem.report.metrics import milliseconds, seconds
from throttllem.report.palette import SLO
from throttllem.sim.result import RunResult, SloOutcome

MOST_POINTS = 400
"""Of one curve; a screen shows no more."""
_HEIGHT_PX = 320

Curve = tuple[list[float], list[float]]
"""Values, ascending, and the per cent of the sample at or below each."""


def curve(sample: Sequence[float]) -> Curve:
    """The empirical distribution at no more than MOST_POINTS points, a quarter of them in the slowest 3 %."""
    ordered = sorted(value for value in sample if isfinite(value))
    count = len(ordered)
    if count <= MOST_POINTS:
        places = list(range(count))
    else:
        tail = int(0.97 * count)
        body = _spread(0, tail, MOST_POINTS * 3 // 4)
        places = sorted({*body, *_spread(tail, count - 1, MOST_POINTS // 4)})
    return [ordered[place] for place in places], [(place + 1) / count * 100 for place in places]


def counted_curve(edges: Sequence[float], counts: Sequence[int]) -> Curve:
    """The same from a histogram: exact at the upper edges, cut before the first and after the last nonzero count."""
    total = sum(counts)
    if total == 0:
        return [], []
    up_to = list(accumulate(counts))
    nonzero = [place for place, count in enumerate(counts) if count]
    places = [place for place in range(max(0, nonzero[0] - 1), nonzero[-1] + 1) if isfinite(edges[place + 1])]
    if len(places) > MOST_POINTS:
        places = [places[place] for place in _spread(0, len(places) - 1, MOST_POINTS)]
    return [edges[place + 1] for place in places], [up_to[place] / total * 100 for place in places]


def _spread(first: int, last: int, count: int) -> list[int]:
    """`count` whole numbers from `first` to `last`, evenly."""
    return [first + (last - first) * place // (count - 1) for place in range(count)]


def latency_plot(lines: Sequence[Line], slo: SloOutcome) -> Plot | None:
    """E2E latency of the completed requests, with its SLO."""
    return _plot(
        lines,
        [curve(line.run.distributions.e2e_s) for line in lines],
        lambda run: f"p99 {seconds(run.e2e_s.p99)} s",
        key="e2e",
        title="E2E latency",
        caption="Arrival to last token, completed requests. Left of the dotted line: SLO met.",
        unit="seconds",
        slo=None if slo.e2e_s is None else (slo.e2e_s, f"SLO {seconds(slo.e2e_s)} s"),
    )


def tpot_plot(lines: Sequence[Line], slo: SloOutcome) -> Plot | None:
    """Mean time between the tokens of a request (TPOT), with its SLO."""
    return _plot(
        lines,
        [_in_ms(curve(line.run.distributions.tpot_s)) for line in lines],
        lambda run: f"p99 {milliseconds(run.tpot_s.p99)} ms",
        key="tpot",
        title="Mean time between tokens of a request (TPOT)",
        caption="The TBT SLO applies to each request's mean, its first token excluded.",
        unit="milliseconds",
        slo=None if slo.tbt_s is None else (slo.tbt_s * 1e3, f"SLO {milliseconds(slo.tbt_s)} ms"),
    )


def gap_plot(lines: Sequence[Line]) -> Plot | None:
    """Single gaps between tokens (TBT), on a logarithmic axis: prefills of other requests make a long tail."""
    every = [line.run.distributions for line in lines]
    curves = [_in_ms(counted_curve(each.tbt_edges_s, each.tbt_counts)) for each in every]
    plot = _plot(
        lines,
        curves,
        lambda run: f"p99 {milliseconds(run.tbt_s.p99)} ms",
        key="tbt",
        title="Single gaps between tokens (TBT)",
        caption="Every gap of every request. The long tail is iterations that also process prompts. Logarithmic axis.",
        unit="milliseconds",
        slo=None,
    )
    values = [value for each, _ in curves for value in each if value > 0]
    if plot is None or not values:
        return None
    low, high = log10(min(values)), log10(max(values))
    ticks = [step * 10**power for power in range(-3, 7) for step in (1, 2, 5)]
    texts = [f"{tick:g}" for tick in ticks]
    plot.figure.update_xaxes(type="log", range=[low - 0.03, high + 0.03], tickvals=ticks, ticktext=texts)
    return plot


def _in_ms(values_s: Curve) -> Curve:
    return [value * 1e3 for value in values_s[0]], values_s[1]


def _plot(
    lines: Sequence[Line],
    curves: Sequence[Curve],
    text_of: Callable[[RunResult], str],
    *,
    key: str,
    title: str,
    caption: str,
    unit: str,
    slo: tuple[float, str] | None,
) -> Plot | None:
    """The curves of all policies with the SLO (value, text); None where there is no value."""
    if not any(values for values, _ in curves):
        return None
    traces = [
        go.Scatter(
            name=line.name,
            mode="lines",
            x=short(values),
            y=short(shares),
            line={"color": line.colour, "width": 2, "dash": dash(line.run).removesuffix("ed"), "shape": "hv"},
            hovertemplate=f"%{{y:.1f}} % within %{{x:.4g}} {unit}",
        )
        for line, (values, shares) in zip(lines, curves, strict=True)
    ]
    # A single straggler would squeeze every curve against the left edge; a double click shows it.
    ends = [
        next((value for value, share in zip(*each, strict=True) if share >= 99.7), each[0][-1])
        for each in curves
        if each[0]
    ]
    figure = new_figure(traces, _HEIGHT_PX, hovermode="closest")
    figure.update_layout(margin_t=10)
    figure.update_xaxes(title_text=unit, range=[0, max([*ends, *([slo[0]] if slo else [])]) * 1.08])
    figure.update_yaxes(title_text="% at or below", range=[0, 101])
    texts = [text_of(line.run) for line in lines]
    if slo:
        figure.add_vline(slo[0], line={"color": SLO.light, "width": 1.5, "dash": "dot"})
        where = {"x": slo[0], "xanchor": "right", "xshift": -4, "y": 0.04, "yref": "paper", "yanchor": "bottom"}
        figure.add_annotation(text=slo[1], font={"size": 12, "color": SLO.light}, **where)
    return Plot(
        key=key,
        title=title,
        caption=caption,
        summary=summary(lines, texts) + (f"; {slo[1]}" if slo else ""),
        figure=figure,
        keyed=True,
    )
