"""Sections as Markdown tables and pictures, put between two marks of a document. Knows nothing of what they compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from throttllem.files import write_aside
from tools.fidelity.section import ErrorRow, Section, Target
from tools.testbed.report import markdown_rows

BEGIN, END = "<!-- fidelity: written by `make fidelity` -->", "<!-- /fidelity -->"
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}


def draw(section: Section, folder: Path) -> None:
    """Every plot of a section, as a picture of its name."""
    for plot in section.plots:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            FigureCanvasAgg(figure)
            plot.draw(figure)
            # No date inside: the same figures make the same file.
            with write_aside(folder / f"{plot.name}.png") as aside:
                figure.savefig(aside, format="png", dpi=110, metadata={"Software": None})


def markdown(sections: Sequence[Section], folder: str) -> str:
    """All sections, one below the other; pictures by links into `folder`."""
    return "\n".join(_section(section, folder) for section in sections)


def _section(section: Section, folder: str) -> str:
    parts = [f"### {section.title}", section.text.strip()]
    if section.targets:
        parts.append(markdown_rows(("target", "limit", "found", ""), [_target(target) for target in section.targets]))
    if section.rows:
        head = ("error of", "held out", "points", "mean", "median", "p90", "worst")
        parts.append(markdown_rows(head, [_row(row) for row in section.rows]))
    parts += [f"![{plot.caption}]({folder}/{plot.name}.png)\n\n*{plot.caption}*" for plot in section.plots]
    return "\n\n".join(parts) + "\n"


def _target(target: Target) -> tuple[str, ...]:
    return target.what, target.limit, target.found, "met" if target.met else "**not met**"


def _row(row: ErrorRow) -> tuple[str, ...]:
    errors = row.errors
    figures = (f"{figure:.1%}" for figure in (errors.mean, errors.median, errors.p90, errors.worst))
    return row.what, row.held_out, f"{errors.count:,}", *figures
