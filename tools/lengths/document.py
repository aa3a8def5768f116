"""Scores as tables and a picture, between two marks of a document. Knows nothing of how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from throttllem.files import write_aside
from tools.fidelity.document import STYLE
from tools.lengths.cost import Cost
from tools.lengths.replay import WINDOW, Score
from tools.testbed.report import markdown_rows

BEGIN, END = "<!-- lengths: written by `make lengths` -->", "<!-- /lengths -->"
HEAD = (
    "bound by",
    "asked",
    "exceeded",
    f"by {WINDOW:,}: least",
    "most",
    "renewed, exceeded",
    "error",
    "bound / answer",
)
COST_HEAD = ("", "groups", "predict", "renew", "learn", "in memory", "as JSON")
_COLOURS = ("#0072B2", "#E69F00", "#009E73")
"""Three of Okabe and Ito's, for every kind of sight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One predictor on one set; `asked` is the fraction that may exceed its bound (None: it is not asked)."""

    by: str
    asked: float | None
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """All predictors on one set."""

    title: str
    in_time: bool
    lines: tuple[Line, ...]

    @property
    def about(self) -> str:
        """How many requests there are, and for how many the first predictor could not say."""
        score = self.lines[0].score
        order = "in order of time" if self.in_time else "no order of time: as they stand in the file, five a second"
        text = f"{score.count:,} requests, {order}; no prediction for {score.unknown} at the start"
        ours = [
            line for line in self.lines if line.by == self.lines[0].by and line.score.callers[0] < line.score.callers[1]
        ]
        each = (f"{line.score.callers[0]:.1%} to {line.score.callers[1]:.1%} (asked {line.asked:.0%})" for line in ours)
        return f"{text}; exceeded by caller: {', '.join(each)}" if ours else text


def cells(line: Line) -> tuple[str, ...]:
    """One line, as text."""
    score = line.score
    return (
        line.by,
        "" if line.asked is None else f"{line.asked:.0%}",
        f"{score.exceeded:.1%}",
        f"{score.best:.1%}",
        f"{score.worst:.1%}",
        "" if score.again is None else f"{score.again:.0%}",
        f"{score.error_tokens:,.1f}",
        f"{score.inflated:.2f}",
    )


def cost_cells(cost: Cost) -> tuple[str, ...]:
    """Costs, as text."""
    times = (cost.predict_s, cost.renew_s, cost.learn_s)
    sizes = (cost.memory_bytes, cost.state_bytes)
    return (
        cost.what,
        f"{cost.groups:,}",
        *(f"{seconds * 1e6:.0f} us" for seconds in times),
        *(f"{size / 1e6:.2f} MB" for size in sizes),
    )


def markdown(tables: Sequence[Table], costs: Sequence[Cost], picture: str) -> str:
    """All tables, one below the other."""
    parts = [f"![Exceeded bounds over the Azure chat trace, and what calibration costs]({picture})"]
    for table in tables:
        parts += [f"### {table.title}", f"{table.about}.", markdown_rows(HEAD, [cells(line) for line in table.lines])]
    parts += ["### Costs", markdown_rows(COST_HEAD, [cost_cells(cost) for cost in costs])]
    return "\n\n".join(parts) + "\n"


def draw(table: Table, path: Path) -> None:
    """One set: exceeded over the last requests by place in the order; and exceeded against how much is inflated."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        asked = [line for line in table.lines if line.by == table.lines[0].by]
        for colour, line in zip(_COLOURS, asked, strict=False):
            places = range(WINDOW, WINDOW + len(line.score.rolling))
            left.plot(places, 100 * line.score.rolling, color=colour, label=f"asked {line.asked:.0%}")
            left.axhline(100 * (line.asked or 0), color=colour, linestyle=":", linewidth=1)
        left.set(xlabel="requests so far", ylabel=f"exceeded of the last {WINDOW:,} (%)", ylim=(0, 27))
        left.legend(loc="upper center", ncols=3)
        for by in dict.fromkeys(line.by for line in table.lines if line.by != "max_tokens"):
            scores = [line.score for line in table.lines if line.by == by]
            right.plot([100 * score.exceeded for score in scores], [score.inflated for score in scores], "o-", label=by)
        right.set(xlabel="answers that exceed their bound (%)", ylabel="mean bound / mean answer", ylim=(0, None))
        right.legend(fontsize="small")
        figure.suptitle(table.title)
        # No date inside: the same figures make the same file.
        with write_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=110, metadata={"Software": None})
