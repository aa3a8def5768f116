"""Pictures of the A100's serving sweep: measured cells as dots, the law as lines. Knows nothing of fits."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tools.fidelity.a100_fit import Cell, Served, figures
from tools.fidelity.section import Plot

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")
"""Okabe and Ito's, for every kind of sight."""
_SHOWN_MHZ = (600, 1410)
Curve = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Of seconds and watts by ascending clock, the figure to show."""


def plots(law: Served, cells: Sequence[Cell]) -> tuple[Plot, ...]:
    """Slow-down and watts, and energy, over the clock."""
    return (
        Plot(
            name="a100-serving",
            caption="A100-40GB serving Llama-3-8B: seconds relative to 1,410 MHz, and mean watts.",
            draw=partial(_draw, law, cells, (_slow_down, "time / time at 1,410 MHz"), (_watts, "mean power (W)")),
        ),
        Plot(
            name="a100-energy",
            caption="A100-40GB serving Llama-3-8B: joules relative to 1,410 MHz, and what is left in watts.",
            draw=partial(_draw_energy, law, cells),
        ),
    )


def _slow_down(figures_: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = figures_[:, 0] / figures_[-1, 0]
    return found


def _watts(figures_: NDArray[np.float64]) -> NDArray[np.float64]:
    return figures_[:, 1]


def _energy(figures_: NDArray[np.float64]) -> NDArray[np.float64]:
    joules = np.prod(figures_, axis=1)
    found: NDArray[np.float64] = joules / joules[-1]
    return found


def _draw(
    law: Served, cells: Sequence[Cell], left: tuple[Curve, str], right: tuple[Curve, str], figure: Figure
) -> None:
    for axes, (curve, label) in zip(figure.subplots(1, 2), (left, right), strict=True):
        _curves(axes, law, cells, curve)
        axes.set(xlabel="clock (MHz)", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(title="batch", fontsize="small")
    figure.suptitle("A100 serving Llama-3-8B (dots measured, lines physics)")


def _draw_energy(law: Served, cells: Sequence[Cell], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    _curves(left, law, cells, _energy)
    left.set(xlabel="clock (MHz)", ylabel="energy / energy at 1,410 MHz")
    left.legend(title="batch", fontsize="small")
    errors = 100 * (law.of(cells) / figures(cells) - 1)
    for colour, batch in zip(COLOURS, sorted({cell.batch for cell in cells}), strict=True):
        chosen = [cell.batch == batch for cell in cells]
        clocks = [cell.clock_mhz for cell in cells if cell.batch == batch]
        right.plot(clocks, errors[chosen, 1], "o", color=colour, markersize=4)
    right.axhline(0, color="grey", linewidth=1)
    right.set(xlabel="clock (MHz)", ylabel="physics - measured, watts (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle("A100 serving Llama-3-8B: energy, and what is left")


def _curves(axes: Axes, law: Served, cells: Sequence[Cell], curve: Curve) -> None:
    clocks = [clock for clock in law.gpu.clocks_mhz if _SHOWN_MHZ[0] <= clock <= _SHOWN_MHZ[1]]
    for colour, batch in zip(COLOURS, sorted({cell.batch for cell in cells}), strict=True):
        own = sorted((cell for cell in cells if cell.batch == batch), key=lambda cell: cell.clock_mhz)
        axes.plot([cell.clock_mhz for cell in own], curve(figures(own)), "o", color=colour, markersize=4)
        axes.plot(clocks, curve(law.at([(clock, batch) for clock in clocks])), color=colour, label=str(batch))
