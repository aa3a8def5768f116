"""ITL and watts of models served on H100 and B200 against the physics; each model, GPU and batch range left out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from throttllem.calibrate.errors import Errors
from throttllem.physics.catalogue import Catalogue
from tools.fidelity.load_runs import MODEL, read_points, simulate
from tools.fidelity.section import ErrorRow, Plot, Section, Target
from tools.fidelity.served_fit import B200, H100, MOST_BATCH, Loads, fit_served
from tools.fidelity.served_rows import Row, ratios, read_rows

BATCHES = (8, 32, 128, MOST_BATCH)
"""Upper ends of the ranges of batches that are left out together."""
REQUESTS, SEED, EVERY = 300, 100, 3
"""Of the simulated loads behind the folds; every third point of them, for they fit in well under a second."""
_COLOURS = {"dense": "#0072B2", "experts": "#E69F00", "experts, FP8 or MXFP4": "#CC79A7"}
Found = NDArray[np.float64]
"""Signed relative errors of ITL and watts, a row for each row of the data."""


def section(data: Path, catalogue: Catalogue) -> Section:
    """The shipped catalogue on every row; refits with models, GPUs and batches left out; a refit on everything."""
    rows, gpus = read_rows(data, catalogue), (catalogue.gpu(H100), catalogue.gpu(B200))
    points = read_points(data)[::EVERY]
    served = [simulate(catalogue, point, requests=REQUESTS, seeds=(SEED,)) for point in points]
    loads = Loads(model=catalogue.model(MODEL), points=points, served=served)
    shipped = ratios(gpus, rows) - 1
    found = {"nothing": shipped} | {
        name: _held_out(catalogue, rows, loads, group)
        for name, group in {"each model": _model, "each range of batches": _batches, "each GPU": _gpu}.items()
    }
    return Section(
        title="Served models on H100 and B200",
        text=_TEXT,
        rows=tuple(
            ErrorRow(what=f"{figure}: {what}", held_out=held_out, errors=Errors.of(errors[chosen, column]))
            for held_out, errors in found.items()
            for what, chosen in _groups(rows).items()
            for column, figure in enumerate(("ITL", "watts"))
        ),
        targets=_targets(rows, found),
        plots=(
            Plot(
                name="served",
                caption="Models served on H100 and B200: ITL and watts of a GPU, measured and by the physics.",
                draw=functools.partial(_draw, rows, shipped),
            ),
        ),
        constants=fit_served(*gpus, rows, None).constants,
    )


def _held_out(catalogue: Catalogue, rows: Sequence[Row], loads: Loads, group: Callable[[Row], Hashable]) -> Found:
    """Errors of every row by a fit that did not see its group."""
    errors = np.empty((len(rows), 2))
    for left in dict.fromkeys(map(group, rows)):
        seen = [row for row in rows if group(row) != left]
        at = [index for index, row in enumerate(rows) if group(row) == left]
        fitted = fit_served(catalogue.gpu(H100), catalogue.gpu(B200), seen, loads)
        errors[at] = ratios(fitted.gpus, [rows[index] for index in at]) - 1
    return errors


def _model(row: Row) -> str:
    """The FP8 checkpoint is another model; the sizes of gpt-oss, and Qwen3 of another size, are others too."""
    return row.model.name


def _batches(row: Row) -> int:
    return next((most for most in BATCHES if row.batch <= most), BATCHES[-1] + 1)


def _gpu(row: Row) -> str:
    return row.gpu


def _groups(rows: Sequence[Row]) -> dict[str, NDArray[np.bool_]]:
    special = np.array([row.special for row in rows])
    h100 = np.array([row.gpu == H100 for row in rows])
    stalled = np.array([row.stalled for row in rows])
    return {
        "dense, H100": ~special & h100,
        "experts or FP8": special,
        "experts or FP8, H100": special & h100,
        "experts or FP8, B200": special & ~h100,
        "one B200 with a Qwen3, dense or not": stalled,
    }


def _targets(rows: Sequence[Row], found: dict[str, Found]) -> tuple[Target, ...]:
    groups, targets = _groups(rows), []
    wanted = (
        ("dense, H100", "nothing", 0.08),
        ("experts or FP8", "nothing", 0.15),
        ("experts or FP8", "each model", 0.15),
        ("experts or FP8", "each range of batches", 0.15),
    )
    for what, held_out, limit in wanted:
        for column, figure in enumerate(("ITL", "watts")):
            median = Errors.of(found[held_out][groups[what], column]).median
            targets.append(
                Target(
                    what=f"{figure} of {what}, median error with {held_out} held out",
                    limit=f"{limit:.0%}",
                    found=f"{median:.1%}",
                    met=median <= limit,
                )
            )
    return tuple(targets)


def _draw(rows: Sequence[Row], errors: Found, figure: Figure) -> None:
    measured = np.array([(row.itl_s * 1e3, row.power_w / row.gpus) for row in rows])
    ours = measured * (1 + errors)
    kinds = np.array([_kind(row) for row in rows])
    marks = np.array(["o" if row.gpu == H100 else "^" for row in rows])
    for column, axes in enumerate(figure.subplots(1, 2)):
        for kind, colour in _COLOURS.items():
            for mark, gpu in (("o", "H100"), ("^", "B200")):
                at = (kinds == kind) & (marks == mark)
                label = f"{kind}, {gpu}" if column == 0 else None
                axes.plot(measured[at, column], ours[at, column], mark, color=colour, markersize=4, label=label)
        ends = [measured[:, column].min(), measured[:, column].max()]
        axes.plot(ends, ends, color="grey", linewidth=1)
        axes.set_xlabel(("ITL / ms, measured", "watts of a GPU, measured")[column])
        axes.set_ylabel("physics")
    figure.axes[0].set_xscale("log")
    figure.axes[0].set_yscale("log")
    figure.axes[0].legend(fontsize="x-small")


def _kind(row: Row) -> str:
    if row.model.experts is None:
        return "dense"
    return "experts" if row.model.expert_weights.bytes_per_parameter == 2 else "experts, FP8 or MXFP4"


_TEXT = """\
Steady batches of 8 to 4,095 requests of the GPQA task, served by vLLM at default clocks (ML.ENERGY leaderboard v3): the
median ITL and the mean watts, of Qwen3 (8B, 14B, 32B, 30B-A3B, 235B-A22B in bfloat16 and FP8), gpt-oss (20B, 120B) and
DeepSeek (R1, V3.1) on 1 to 8 H100 and B200. The two Mamba hybrids are left out: the law has no such layer. Contexts
follow from published output lengths and a prompt of 300 tokens, which is assumed.

Six times are fitted to all rows: the host's per iteration and per request, which both GPUs share, and what a layer of
experts takes beside its products, one for each GPU and one for FP8. Watts of the H100 are fitted to these rows and to
the loads above at once: locked at 1,830 MHz it draws what it draws at its default of 1,980, so watts rise no further
above some clock (`ceiling_mhz`); reading the KV cache draws more than reading weights (`attention_w`), and so does
unpacking 4-bit weights (`unpack_w`). The B200 has the shape of the H100's law, scaled to its limit; five watts are
moved.

What the law leaves. One B200 with a Qwen3 needs 30 to 45 ms a token from 8B to 32B and from batch 8 to 64, three to
seven times an H100: the host set the pace there, no figure of the GPU explains it, and those rows are judged but not
fitted. From batch 1,024 on requests wait for KV blocks and for the scheduler, which an iteration does not know. BF16
experts on eight B200 take 7 ms more from batch 32 on (four: from 64), as if all-reduces changed their way there. The
leaderboard's own scatter between tasks is about 15 % in watts.
"""
