"""Building blocks of the report's plots: plain plotly figures (JSON values), with colours by token (see palette.py).

Knows plotly's schema and nothing of what is drawn. Every text that goes in must have been escaped by `label`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from throttllem.report.palette import token
from throttllem.sim.result import RunResult

Json = dict[str, object]

PANEL_PX = 84
PANEL_GAP_PX = 34
TOP_PX = 34
BOTTOM_PX = 46


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot of the page: `summary` says in words what it shows, for those who cannot see it."""

    key: str
    title: str
    caption: str
    summary: str
    height_px: int
    data: list[Json]
    layout: Json
    keyed: bool = False
    """Whether the page writes a key of the policies above it (plotly's own would take the height of a phone's plot)."""
    wide: bool = False
    """Whether it takes both columns of the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One policy's strip in a figure of strips that share both axes."""

    title: str
    traces: list[Json]


def label(text: str) -> str:
    """A name as plotly may show it: its own small markup (`<b>`, `<a>`, `$x$`) taken out of force."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def short(value: float | None) -> float | None:
    """Four significant digits, to keep the page small; None for what JSON cannot say."""
    return float(f"{value:.4g}") if value is not None and isfinite(value) else None


def shorten(values: Sequence[float | None]) -> list[float | None]:
    """`short` of each."""
    return [short(value) for value in values]


def axis(title: str = "", **settings: object) -> Json:
    """An axis in the report's style."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": "@soft"}, "standoff": 8},
        "gridcolor": "@grid",
        "linecolor": "@grid",
        "zerolinecolor": "@grid",
        "tickfont": {"size": 11, "color": "@soft"},
        "automargin": True,
        **settings,
    }


def layout(**settings: object) -> Json:
    """A layout in the report's style; the page adds nothing but the width."""
    return {
        "paper_bgcolor": "@clear",
        "plot_bgcolor": "@clear",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": "@ink"},
        "margin": {"l": 12, "r": 12, "t": TOP_PX, "b": BOTTOM_PX},
        "hoverlabel": {"bgcolor": "@card", "bordercolor": "@grid", "font": {"color": "@ink"}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yanchor": "bottom",
            "traceorder": "normal",
            "font": {"size": 12},
        },
        "showlegend": False,
        **settings,
    }


def dash(run: RunResult) -> str:
    """How lines of this policy are stroked, in CSS's words: colour is not to be the only sign."""
    return "dashed" if run.policy.endswith("+autoscale") else "solid"


def line(run: RunResult, index: int, *, width_px: float = 2, step: bool = False) -> Json:
    """How the policy at `index` is drawn."""
    return {
        "color": token(index),
        "width": width_px,
        "dash": dash(run).removesuffix("ed"),
        "shape": "hv" if step else "linear",
    }


def note(text: str, **settings: object) -> Json:
    """An annotation without an arrow."""
    return {"text": text, "showarrow": False, "font": {"size": 12, "color": "@ink"}, **settings}


def promise_line(promise: float, text: str) -> Json:
    """A promise drawn into a figure with one x axis: the settings `shapes` and `annotations`."""
    stroke = {"color": "@slo", "width": 1.5, "dash": "dot"}
    shape = {"type": "line", "xref": "x", "yref": "paper", "x0": promise, "x1": promise, "y0": 0, "y1": 1}
    tag = note(text, x=promise, y=0.04, xref="x", yref="paper", xanchor="right", yanchor="bottom", xshift=-4)
    return {"shapes": [{**shape, "line": stroke}], "annotations": [tag | {"font": {"size": 12, "color": "@slo"}}]}


def time_unit(runs: Sequence[RunResult]) -> tuple[str, float]:
    """Name and seconds of the unit in which time is drawn."""
    longest_s = max(run.duration_s for run in runs)
    return ("minutes", 60.0) if longest_s > 600 else ("seconds", 1.0)


def strips(
    panels: Sequence[Panel], *, x_title: str, y_range: tuple[float, float], legend: bool
) -> tuple[list[Json], Json, int]:
    """Strips one above the other, over one x axis and with one y range; (data, layout, height in pixels)."""
    plot_px = len(panels) * (PANEL_PX + PANEL_GAP_PX)
    top_px = TOP_PX if legend else 8
    data: list[Json] = []
    settings: Json = {}
    notes: list[Json] = []
    for place, panel in enumerate(panels):
        suffix = "" if place == 0 else str(place + 1)
        bottom = (len(panels) - 1 - place) * (PANEL_PX + PANEL_GAP_PX) / plot_px
        top = bottom + PANEL_PX / plot_px
        settings[f"yaxis{suffix}"] = axis(domain=[bottom, top], range=list(y_range), nticks=5)
        notes.append(note(panel.title, x=0, y=top, xref="paper", yref="paper", xanchor="left", yanchor="bottom"))
        data += [{**trace, "xaxis": "x", "yaxis": f"y{suffix}"} for trace in panel.traces]
    last = "" if len(panels) == 1 else str(len(panels))
    settings["xaxis"] = axis(x_title, anchor=f"y{last}", rangemode="tozero")
    margin = {"l": 12, "r": 12, "t": top_px, "b": BOTTOM_PX}
    shape = layout(**settings, annotations=notes, hovermode="x", margin=margin, showlegend=legend)
    return data, shape, plot_px + top_px + BOTTOM_PX
