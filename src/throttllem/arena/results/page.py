"""The arena as one HTML file that opens offline: savings, shares of the clairvoyant's, and a Pareto plot by cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from throttllem.arena.cells import Grid
from throttllem.arena.contenders import BASELINE, SCHED, STATIC
from throttllem.arena.contest import Entry, rows_of
from throttllem.arena.results.standings import CLAIRVOYANT, by_cell, saving, share_of_reference, targets
from throttllem.files import ensure_writable_dir, write_aside
from throttllem.report.figure import label, new_figure
from throttllem.report.palette import policy_inks

PAGE = "arena.html"
_COLUMNS = 4


def write_page(folder: Path, entries: Sequence[Entry], grid: Grid, tree: str) -> Path:
    """Write `arena.html` into a folder, created if absent; returns its path."""
    figures = {"savings": _savings(entries, grid), "pareto": _pareto(entries)}
    if SCHED in rows_of(entries):
        figures["shares"] = _shares(entries, grid)
    text = Template(files("throttllem.arena.results").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        lead=escape(
            f"{len(grid.cells)} cells of the {grid.name} grid, {len({entry.seed for entry in entries})} seeds, sources "
            f"{tree}. Requests, clocks and SLOs are simulated in virtual time; seconds and watts are modelled."
        ),
        targets=_targets(entries),
        plots="\n".join(
            f'<h2>{_TITLES[key]}</h2><section><div id="plot-{key}"></div><p>{_CAPTIONS[key]}</p></section>'
            for key in figures
        ),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        figures=_script_safe("{" + ",".join(f'"{key}":{figure.to_json()}' for key, figure in figures.items()) + "}"),
    )
    path = ensure_writable_dir(folder) / PAGE
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


_TITLES = {
    "savings": "Energy saved against the maximum clock",
    "shares": "Share of the clairvoyant schedule's saving",
    "pareto": "Energy and attainment, cell by cell",
}
_CAPTIONS = {
    "savings": "Mean over the cells of a group, with 95 % intervals over the seeds.",
    "shares": "100 %: as much as a schedule of clocks that knows all requests in advance.",
    "pareto": "Energy in % of the maximum clock's, attainment in points against it; the line is static clocks. Lower "
    "and further to the right is better; left of the dotted line SLOs count as missed. First seed.",
}


def _script_safe(text: str) -> str:
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _targets(entries: Sequence[Entry]) -> str:
    marks = {True: ("yes", "met"), False: ("no", "not met"), None: ("", "not run")}
    rows = [
        f"<tr><td>{escape(target.asked)}</td><td>{escape(target.found)}</td>"
        f'<td class="{marks[target.met][0]}">{marks[target.met][1]}</td></tr>'
        for target in targets(entries)
    ]
    return f"<table>{''.join(rows)}</table>"


def _savings(entries: Sequence[Entry], grid: Grid) -> go.Figure:
    names = [name for name in rows_of(entries) if name != BASELINE]
    groups = {**{group: [entry for entry in entries if entry.cell.group == group] for group in grid.groups}}
    groups["all"] = list(entries)
    bars = []
    for name, ink in zip(names, policy_inks(names), strict=True):
        means = [saving(of, name) for of in groups.values()]
        bars.append(
            go.Bar(
                name=label(name),
                x=list(groups),
                y=[round(mean.value * 100, 2) for mean in means],
                error_y={"type": "data", "array": [(mean.half_width or 0.0) * 100 for mean in means]},
                marker_color=ink.light,
            )
        )
    return new_figure(bars, 460, barmode="group", showlegend=True, yaxis={"title": {"text": "% saved"}})


def _shares(entries: Sequence[Entry], grid: Grid) -> go.Figure:
    names = [name for name in rows_of(entries) if name not in (BASELINE, *CLAIRVOYANT)]
    groups = {**{group: [entry for entry in entries if entry.cell.group == group] for group in grid.groups}}
    groups["all"] = list(entries)
    shares = [[share_of_reference(of, name, SCHED) for of in groups.values()] for name in names]
    percent = [[None if share is None else round(share * 100, 1) for share in row] for row in shares]
    heat = go.Heatmap(
        z=percent, x=list(groups), y=names, texttemplate="%{z:.0f}", colorscale="RdYlGn", zmin=50, zmax=100
    )
    return new_figure([heat], 60 + 26 * len(names))


def _pareto(entries: Sequence[Entry]) -> go.Figure:
    """One small plot for each cell, of its first seed."""
    cells = by_cell(entries)
    rows = math.ceil(len(cells) / _COLUMNS)
    names = [name for name in rows_of(entries) if name != BASELINE]
    inks = dict(zip(names, policy_inks(names), strict=True))
    figure: Any = make_subplots(
        rows=rows,
        cols=_COLUMNS,
        subplot_titles=[label(cell.name) for cell in cells],
        vertical_spacing=min(0.05, 0.35 / rows),
        horizontal_spacing=0.05,
    )
    for index, seeds in enumerate(cells.values()):
        entry, place = seeds[0], {"row": index // _COLUMNS + 1, "col": index % _COLUMNS + 1}
        tried = sorted(entry.tried.get(STATIC, ()), key=lambda outcome: outcome.mean_clock_mhz)
        points = [_point(entry, outcome) for outcome in tried]
        line = {"color": "#9aa5b1", "width": 1}
        figure.add_trace(
            go.Scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="lines", line=line, hoverinfo="skip"),
            **place,
        )
        for name in names:
            x, y = _point(entry, entry.rows[name])
            figure.add_trace(
                go.Scatter(
                    x=[x],
                    y=[y],
                    name=label(name),
                    legendgroup=name,
                    showlegend=index == 0,
                    mode="markers",
                    marker={"color": inks[name].light, "size": 8},
                    hovertemplate=f"{label(name)}: %{{x:.2f}} points, %{{y:.1f}} %<extra></extra>",
                ),
                **place,
            )
        figure.add_vline(x=-0.5, line={"dash": "dot", "width": 1, "color": "#b3261e"}, **place)
    styled = new_figure([], 190 * rows + 80)
    figure.update_layout(template=styled.layout.template, height=190 * rows + 80, margin={"l": 40, "r": 12, "t": 60})
    figure.update_xaxes(range=[-6, 1.5])
    figure.update_annotations(font_size=11)
    figure.data[0].showlegend = False
    figure.for_each_trace(lambda trace: trace.update(showlegend=False) if trace.mode == "lines" else None)
    figure.update_layout(showlegend=True, legend={"y": 1.0 + 60 / (190 * rows + 80)})
    return figure


def _point(entry: Entry, outcome: Any) -> tuple[float, float]:
    points = (outcome.attainment - entry.baseline.attainment) * 100
    return round(points, 3), round(100 * outcome.energy_j / entry.baseline.energy_j, 2)
