"""The style of the report's plots: one plotly template, in the light theme's colours, and what every plot is made of.

Knows nothing of what is drawn. Every name that goes into a figure must have been escaped by `label`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from plotly import graph_objects as go

from throttllem.report.palette import CARD, GRID, SOFT, TEXT, policy_inks
from throttllem.sim.result import RunResult

TOP_PX, BOTTOM_PX = 34, 46
_CLEAR = "rgba(0,0,0,0)"
_AXIS = {
    "title": {"font": {"size": 12, "color": SOFT.light}, "standoff": 8},
    "gridcolor": GRID.light,
    "linecolor": GRID.light,
    "zerolinecolor": GRID.light,
    "tickfont": {"size": 11, "color": SOFT.light},
    "automargin": True,
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_LEGEND = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal", "font": {"size": 12}}
_STYLE = go.layout.Template(
    layout={
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "font": {"family": _FONT, "size": 12, "color": TEXT.light},
        "hoverlabel": {"bgcolor": CARD.light, "bordercolor": GRID.light, "font": {"color": TEXT.light}},
        "legend": _LEGEND,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "annotationdefaults": {"showarrow": False, "font": {"size": 12, "color": TEXT.light}},
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot of the page: `summary` is its content as text, for readers who cannot see it."""

    key: str
    title: str
    caption: str
    summary: str
    figure: go.Figure
    keyed: bool = False
    """Whether the page writes a key of the policies above it (plotly's own would fill a phone's plot)."""
    wide: bool = False
    """Whether it takes both columns of the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One run as it is drawn: its colour, and the times of its series in `unit`."""

    run: RunResult
    colour: str
    time: list[float | None]
    unit: str

    @property
    def name(self) -> str:
        """The policy, as plotly may show it."""
        return label(self.run.policy)

    def heading(self, text: str) -> str:
        """The policy in bold, then a text."""
        return f"<b>{self.name}</b>  {text}"


def lines_of(runs: Sequence[RunResult]) -> list[Line]:
    """Every run with its colour, and its times in minutes if any run is long."""
    unit, unit_s = ("minutes", 60.0) if max(run.duration_s for run in runs) > 600 else ("seconds", 1.0)
    inks = policy_inks([run.policy for run in runs])
    return [
        Line(run=run, colour=ink.light, time=short([time_s / unit_s for time_s in run.series.time_s]), unit=unit)
        for run, ink in zip(runs, inks, strict=True)
    ]


def new_figure(traces: Sequence[Any], height_px: int, **layout: Any) -> go.Figure:
    """A figure in the report's style; the page sets the width."""
    margin = {"l": 12, "r": 12, "t": TOP_PX, "b": BOTTOM_PX}
    return go.Figure(traces, {"template": _STYLE, "margin": margin, "showlegend": False, "height": height_px, **layout})


def summary(lines: Sequence[Line], texts: Sequence[str]) -> str:
    """Each policy with its text."""
    return "; ".join(f"{line.run.policy} {text}" for line, text in zip(lines, texts, strict=True))


def label(text: str) -> str:
    """A name without plotly's markup (`<b>`, `<a>`, `$x$`)."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def dash(run: RunResult) -> str:
    """The stroke of this policy's lines, in CSS's words: autoscaling differs by more than colour."""
    return "dashed" if run.policy.endswith("+autoscale") else "solid"


def short(values: Sequence[float | None]) -> list[float | None]:
    """Four significant digits, to keep the page small; None for what JSON cannot hold."""
    return [float(f"{value:.4g}") if value is not None and isfinite(value) else None for value in values]
