"""Distributions of the report: how many requests were answered within a time, with the promise drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import isfinite, log10

from throttllem.report.figure import BOTTOM_PX, Json, Plot, axis, label, layout, line, promise_line, shorten
from throttllem.report.quantity import milliseconds, seconds
from throttllem.report.verdict import baseline_of
from throttllem.sim.result import RunResult

MOST_POINTS = 400
"""Of one curve: more cannot be told apart on a screen and would only swell the page."""

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
    """The same from a histogram: exact at the upper edges, cut before the first and after the last that is hit."""
    total = sum(counts)
    if total == 0:
        return [], []
    up_to = list(accumulate(counts))
    hit = [place for place, count in enumerate(counts) if count]
    places = [place for place in range(max(0, hit[0] - 1), hit[-1] + 1) if isfinite(edges[place + 1])]
    if len(places) > MOST_POINTS:
        places = [places[place] for place in _spread(0, len(places) - 1, MOST_POINTS)]
    return [edges[place + 1] for place in places], [up_to[place] / total * 100 for place in places]


def latency_plot(runs: Sequence[RunResult]) -> Plot | None:
    """E2E latency of the completed requests, with its SLO."""
    promise_s = baseline_of(runs).slo.e2e_s
    return _plot(
        runs,
        key="e2e",
        title="E2E latency",
        caption="Arrival to last token, completed requests. Left of the dotted line: within the promise.",
        x_title="seconds",
        curves=[curve(run.distributions.e2e_s) for run in runs],
        promise=None if promise_s is None else (promise_s, f"SLO {seconds(promise_s)} s"),
        told=lambda run: f"p99 {seconds(run.e2e_s.p99)} s",
    )


def pace_plot(runs: Sequence[RunResult]) -> Plot | None:
    """Mean time between the tokens of a request (TPOT), with its SLO."""
    promise_s = baseline_of(runs).slo.tbt_s
    return _plot(
        runs,
        key="tpot",
        title="Mean time between tokens of a request (TPOT)",
        caption="What the TBT promise is about: each request's mean, its first token left out.",
        x_title="milliseconds",
        curves=[_in_ms(curve(run.distributions.tpot_s)) for run in runs],
        promise=None if promise_s is None else (promise_s * 1e3, f"SLO {milliseconds(promise_s)} ms"),
        told=lambda run: f"p99 {milliseconds(run.tpot_s.p99)} ms",
    )


def gap_plot(runs: Sequence[RunResult]) -> Plot | None:
    """Single gaps between tokens (TBT), on a logarithmic axis: prefills of others make a long tail."""
    curves = [_in_ms(counted_curve(run.distributions.tbt_edges_s, run.distributions.tbt_counts)) for run in runs]
    plot = _plot(
        runs,
        key="tbt",
        title="Single gaps between tokens (TBT)",
        caption="Every gap of every request. The long tail is iterations that also process prompts. Logarithmic axis.",
        x_title="milliseconds",
        curves=curves,
        promise=None,
        told=lambda run: f"p99 {milliseconds(run.tbt_s.p99)} ms",
    )
    values = [value for values, _ in curves for value in values if value > 0]
    if plot is None or not values:
        return None
    low, high = log10(min(values)), log10(max(values))
    ticks = [step * 10**power for power in range(-3, 7) for step in (1, 2, 5)]
    plot.layout["xaxis"] = axis(
        "milliseconds", type="log", range=[low - 0.03, high + 0.03], tickvals=ticks, ticktext=[f"{t:g}" for t in ticks]
    )
    return plot


def _spread(first: int, last: int, count: int) -> list[int]:
    """`count` whole numbers from `first` to `last`, evenly."""
    return [first + (last - first) * place // (count - 1) for place in range(count)]


def _in_ms(values_s: Curve) -> Curve:
    return [value * 1e3 for value in values_s[0]], values_s[1]


def _plot(
    runs: Sequence[RunResult],
    *,
    key: str,
    title: str,
    caption: str,
    x_title: str,
    curves: Sequence[Curve],
    promise: tuple[float, str] | None,
    told: Callable[[RunResult], str],
) -> Plot | None:
    if not any(values for values, _ in curves):
        return None
    data = [_steps(run, index, of, x_title) for index, (run, of) in enumerate(zip(runs, curves, strict=True))]
    # A single straggler would squeeze every curve against the left edge; a double click shows it.
    ends = [_at_share(values, shares, 99.7) for values, shares in curves if values]
    far = max([*ends, *([] if promise is None else [promise[0]])]) * 1.08
    shape = layout(
        xaxis=axis(x_title, range=[0, far]),
        yaxis=axis("% at or below", range=[0, 101]),
        margin={"l": 12, "r": 12, "t": 10, "b": BOTTOM_PX},
        hovermode="closest",
        **({} if promise is None else promise_line(*promise)),
    )
    summary = "; ".join(f"{run.policy} {told(run)}" for run in runs) + (f"; {promise[1]}" if promise else "")
    return Plot(
        key=key,
        title=title,
        caption=caption,
        summary=summary,
        height_px=_HEIGHT_PX,
        data=data,
        layout=shape,
        keyed=True,
    )


def _steps(run: RunResult, index: int, of: Curve, unit: str) -> Json:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": label(run.policy),
        "x": shorten(of[0]),
        "y": shorten(of[1]),
        "line": line(run, index) | {"shape": "hv"},
        "hovertemplate": f"%{{y:.1f}} % within %{{x:.4g}} {unit}",
    }


def _at_share(values: list[float], shares: list[float], share: float) -> float:
    return next((value for value, below in zip(values, shares, strict=True) if below >= share), values[-1])
