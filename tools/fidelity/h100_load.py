"""H100 SXM with Llama-3.3-70B under Poisson load, TP 4 and 8, three clocks: watts, p99 TPOT and p99 TTFT.

Every figure comes out of the simulator at the measured rate, batching and all; nothing is fitted to the rate.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from throttllem.calibrate.errors import Errors
from throttllem.option_sources import load_options
from throttllem.physics.catalogue import Catalogue
from throttllem.sim.parallel import side_by_side
from tools.fidelity.load_fit import LoadFit, fit_load, with_gpu
from tools.fidelity.load_runs import GPU, LoadPoint, read_points, simulate
from tools.fidelity.section import ErrorRow, Plot, Section, Target
from tools.fidelity.served_fit import MOST_BATCH
from tools.fidelity.served_rows import Row, read_rows

REQUESTS, SEEDS = 1000, (0, 1, 2)
"""Of each judged load."""
FIGURES = ("watts", "p99 TPOT", "p99 TTFT")
UNITS = ("power of all GPUs / W", "p99 TPOT / ms", "p99 TTFT / ms")
NAMES = ("h100_watts", "h100_tpot", "h100_ttft")
LIMITS = (0.07, 0.10, 0.15)
_SCALES = (1.0, 1e3, 1e3)
_COLOURS = ("#0072B2", "#E69F00", "#CC79A7")
"""Okabe and Ito's, which the colour-blind can tell apart."""

Figures = NDArray[np.float64]
"""Watts, p99 TPOT and p99 TTFT of each point; seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A fit that did not see the points `at` (indices), and what the simulator says of them with it."""

    at: tuple[int, ...]
    fitted: LoadFit | None
    by_seed: NDArray[np.float64]
    """Of shape (seeds, points, 3)."""

    @property
    def figures(self) -> Figures:
        """The means over the seeds."""
        return np.asarray(self.by_seed.mean(axis=0))


def section(data: Path, catalogue: Catalogue) -> Section:
    """The shipped catalogue on everything, refits with each clock and each TP left out, and a refit on everything."""
    points = read_points(data)
    rows = [row for row in read_rows(data, catalogue) if row.gpu == GPU and row.batch <= MOST_BATCH]
    clocks, sizes = (left_out(points, group) for group in (lambda p: p.clock_mhz, lambda p: p.tp))
    tasks = [functools.partial(_shipped, catalogue, points), functools.partial(_whole, catalogue, points, rows)]
    tasks += [functools.partial(_fold, catalogue, points, rows, at) for at in clocks + sizes]
    shipped, whole, *folds = side_by_side(tasks, workers=load_options().options.workers)
    by_clock, by_size = folds[: len(clocks)], folds[len(clocks) :]
    assert whole.fitted is not None
    folds_of = (("nothing", [shipped]), ("each clock in turn", by_clock), ("each TP in turn", by_size))
    return Section(
        title="H100 under load",
        text=_text(whole.fitted),
        rows=tuple(
            ErrorRow(what=figure, held_out=held_out, errors=Errors.of(errors(points, found)[:, column]))
            for column, figure in enumerate(FIGURES)
            for held_out, found in folds_of
        ),
        targets=_targets(points, by_clock),
        plots=tuple(_plot(column, points, shipped, by_clock) for column in range(len(FIGURES))),
        constants={GPU: whole.fitted.values},
    )


def left_out(points: Sequence[LoadPoint], group: Callable[[LoadPoint], int]) -> list[tuple[int, ...]]:
    """The indices of each group of points, ascending."""
    return [
        tuple(index for index, point in enumerate(points) if group(point) == value)
        for value in sorted({group(point) for point in points})
    ]


def errors(points: Sequence[LoadPoint], folds: Sequence[Fold]) -> Figures:
    """Signed relative errors, fold after fold."""
    measured = _measured(points)
    return np.concatenate([fold.figures / measured[list(fold.at)] - 1 for fold in folds])


def judge(catalogue: Catalogue, points: Sequence[LoadPoint]) -> NDArray[np.float64]:
    """What the simulator says of each point, seed by seed: shape (seeds, points, 3)."""
    served = [[simulate(catalogue, point, requests=REQUESTS, seeds=(seed,)) for point in points] for seed in SEEDS]
    return np.array([[[each.power_w, each.tpot_p99_s, each.ttft_p99_s] for each in run] for run in served])


def _measured(points: Sequence[LoadPoint]) -> Figures:
    return np.array([[point.power_w, point.tpot_p99_s, point.ttft_p99_s] for point in points])


def _shipped(catalogue: Catalogue, points: Sequence[LoadPoint], _: Callable[[float], None]) -> Fold:
    return Fold(at=tuple(range(len(points))), fitted=None, by_seed=judge(catalogue, points))


def _whole(catalogue: Catalogue, points: Sequence[LoadPoint], rows: Sequence[Row], _: Callable[[float], None]) -> Fold:
    return Fold(at=(), fitted=fit_load(catalogue, points, rows), by_seed=np.empty((len(SEEDS), 0, len(FIGURES))))


def _fold(
    catalogue: Catalogue,
    points: Sequence[LoadPoint],
    rows: Sequence[Row],
    at: tuple[int, ...],
    _: Callable[[float], None],
) -> Fold:
    fitted = fit_load(catalogue, [point for index, point in enumerate(points) if index not in at], rows)
    return Fold(at=at, fitted=fitted, by_seed=judge(with_gpu(catalogue, fitted.gpu), [points[index] for index in at]))


def _targets(points: Sequence[LoadPoint], folds: Sequence[Fold]) -> tuple[Target, ...]:
    medians = np.median(np.abs(errors(points, folds)), axis=0)
    each = [[replace(fold, by_seed=fold.by_seed[[seed]]) for fold in folds] for seed in range(len(SEEDS))]
    spread = np.array([np.median(np.abs(errors(points, run)), axis=0) for run in each])
    return tuple(
        Target(
            what=f"{figure}, each clock left out: median error (of single runs)",
            limit=f"{limit:.0%}",
            found=f"{median:.1%} ({low:.1%} to {high:.1%})",
            met=bool(median <= limit),
        )
        for figure, limit, median, low, high in zip(
            FIGURES, LIMITS, medians, spread.min(axis=0), spread.max(axis=0), strict=True
        )
    )


def _text(fitted: LoadFit) -> str:
    said, unsaid = (
        ", ".join(f"`{each.constant.path}`" for each in fitted.constants if each.determined is determined)
        for determined in (True, False)
    )
    return (
        "Llama-3.3-70B on 4 and 8 H100 SXM under vLLM, 1,023 tokens in and 99 out, at 780, 1,380 and 1,830 MHz "
        f"(figures of Louis-99/vllm-fork). Every point is simulated: Poisson arrivals at its rate, {REQUESTS:,} "
        f"requests, {len(SEEDS)} seeds, default batching and noise, the clock fixed. At the lowest loads the measured "
        "p99 of TTFT is twice a prompt's own time, as prompts that meet by chance make it: arrivals were Poisson, for "
        "evenly spaced ones would not meet. The fits begin at the priors and never see the points that they are judged "
        "on; operator constants are not moved. A fit of the analytic steady state takes turns with a simulation, which "
        "says what that is off by. Watts are fitted to served models at 1,980 MHz (next) at once. The loads determine "
        f"{said}; {unsaid} stay near their priors."
    )


def _plot(column: int, points: Sequence[LoadPoint], shipped: Fold, by_clock: Sequence[Fold]) -> Plot:
    unseen = np.empty_like(shipped.figures)
    for fold in by_clock:
        unseen[list(fold.at)] = fold.figures
    return Plot(
        name=NAMES[column],
        caption=f"H100, Llama-3.3-70B: {FIGURES[column]} over the load. Dots: measured; lines: simulated, solid with "
        "the shipped constants, dashed with constants fitted without that clock.",
        draw=functools.partial(_draw, column, points, shipped.figures, unseen),
    )


def _draw(column: int, points: Sequence[LoadPoint], shipped: Figures, unseen: Figures, figure: Figure) -> None:
    scale, measured = _SCALES[column], _measured(points)
    sizes = sorted({point.tp for point in points})
    for axes, tp in zip(figure.subplots(1, len(sizes), sharey=True), sizes, strict=True):
        clocks = sorted({point.clock_mhz for point in points if point.tp == tp})
        for colour, clock in zip(_COLOURS, clocks, strict=True):
            at = [i for i, point in enumerate(points) if (point.tp, point.clock_mhz) == (tp, clock)]
            rates = [points[i].requests_per_s for i in at]
            axes.plot(rates, measured[at, column] * scale, "o", color=colour, markersize=5)
            axes.plot(rates, shipped[at, column] * scale, "-", color=colour, label=f"{clock:,} MHz")
            axes.plot(rates, unseen[at, column] * scale, "--", color=colour, linewidth=1)
        axes.set_title(f"TP {tp}")
        axes.set_xlabel("offered load / requests per s")
    figure.axes[0].set_ylim(bottom=0)  # the panels share it, so only once all lines are there
    figure.axes[0].set_ylabel(UNITS[column])
    figure.axes[0].legend()
