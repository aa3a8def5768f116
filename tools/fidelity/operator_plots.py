"""Pictures of composed iterations: measured as dots, physics as lines. Knows nothing of how either came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from tools.fidelity.operator_tables import BATCHES, CONTEXTS, Iteration
from tools.fidelity.section import Plot

Compared = tuple[list[Iteration], NDArray[np.float64]]
"""Iterations with the physics' seconds of each."""

_ENGINES = (("llama-2-13b", 2), ("llama-3-8b", 1), ("llama-3-70b", 4))
_CONTEXTS = (64, 1024, 4096)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers tell apart."""


def plots(compared: Mapping[str, Compared]) -> tuple[Plot, ...]:
    """Decode against batch for each GPU, prefill against prompt, and where the decode errors are."""
    decode = [
        Plot(
            name=f"operators-decode-{title.lower()}",
            caption=f"{title}: decode iterations against the batch, composed of measured operators and by the physics.",
            draw=partial(_draw_decode, part=part),
        )
        for title, part in compared.items()
    ]
    prefill = Plot(
        name="operators-prefill",
        caption="Prefill iterations against the prompt, composed of measured operators and by the physics.",
        draw=partial(_draw_prefill, compared=compared),
    )
    errors = Plot(
        name="operators-errors",
        caption="The error of largest size among all engines, decode, by batch and KV tokens of a request.",
        draw=partial(_draw_errors, compared=compared),
    )
    return (*decode, prefill, errors)


def _draw_decode(figure: Figure, part: Compared) -> None:
    figure.set_layout_engine("constrained")
    for place, (model, tp) in enumerate(_ENGINES):
        axes = figure.add_subplot(1, len(_ENGINES), place + 1)
        for colour, tokens in zip(_COLOURS, _CONTEXTS, strict=False):
            chosen = _points(part, model, tp, tokens)
            _dots_and_line(axes, [at.batch for at, _ in chosen], chosen, colour, f"{tokens:,} KV tokens each")
        _finish(axes, f"{model}, TP {tp}", "requests in the batch", place == 0)
    _legend(figure)


def _draw_prefill(figure: Figure, compared: Mapping[str, Compared]) -> None:
    figure.set_layout_engine("constrained")
    for place, (title, part) in enumerate(compared.items()):
        axes = figure.add_subplot(1, len(compared), place + 1)
        for colour, (model, tp) in zip(_COLOURS, (*_ENGINES, ("llama-2-13b", 8), ("llama-3-70b", 8)), strict=False):
            chosen = _points(part, model, tp, None)
            _dots_and_line(axes, [at.tokens for at, _ in chosen], chosen, colour, f"{model}, TP {tp}")
        _finish(axes, title, "tokens of the prompt", place == 0)
    _legend(figure)


def _draw_errors(figure: Figure, compared: Mapping[str, Compared]) -> None:
    figure.set_layout_engine("constrained")
    places = figure.subplots(1, len(compared), squeeze=False)[0]
    for axes, (title, part) in zip(places, compared.items(), strict=True):
        worst = _worst_errors(part)
        image = axes.imshow(100 * worst, cmap="PuOr", vmin=-25, vmax=25, origin="lower", aspect="auto")
        for (row, column), error in np.ndenumerate(worst):
            if np.isfinite(error):
                axes.text(column, row, f"{100 * error:+.0f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(CONTEXTS)), [str(tokens) for tokens in CONTEXTS], rotation=45)
        axes.set_yticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
        axes.set(title=title, xlabel="KV tokens of a request", ylabel="requests in the batch")
    figure.colorbar(image, ax=places, label="physics less measured (%)")


def _worst_errors(part: Compared) -> NDArray[np.float64]:
    """Signed, by batch and context; not a number where nothing was measured."""
    worst = np.full((len(BATCHES), len(CONTEXTS)), np.nan)
    for at, seconds in zip(*part, strict=True):
        if at.decode:
            cell = BATCHES.index(at.batch), CONTEXTS.index(at.tokens)
            error = seconds / at.measured_s - 1
            if not abs(error) <= abs(worst[cell]):
                worst[cell] = error
    return worst


def _points(part: Compared, model: str, tp: int, context: int | None) -> list[tuple[Iteration, float]]:
    """Of one engine: decode at `context` tokens each, or its prompts (None)."""
    return [
        (at, float(seconds))
        for at, seconds in zip(*part, strict=True)
        if (at.model.name, at.tp, at.tokens if at.decode else None) == (model, tp, context)
    ]


def _dots_and_line(
    axes: Axes, sizes: Sequence[int], chosen: Sequence[tuple[Iteration, float]], colour: str, label: str
) -> None:
    axes.plot(sizes, [1e3 * at.measured_s for at, _ in chosen], "o", color=colour, markersize=4)
    axes.plot(sizes, [1e3 * seconds for _, seconds in chosen], "-", color=colour, label=label)


def _finish(axes: Axes, title: str, size: str, first: bool) -> None:
    axes.set(title=title, xlabel=size, yscale="log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.tick_params(axis="x", labelsize=8, rotation=45)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    if first:
        axes.set_ylabel("ms per iteration")


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:,g}"


def _legend(figure: Figure) -> None:
    """One for all panels, below them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, fontsize=8, title="dots measured, lines physics"
    )
