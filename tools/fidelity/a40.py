"""An A40 serving Llama-3-8B, mean watts by clock, prefill tokens and decode batch, against the power law.

The data set gives cells, not points: the law is averaged over each cell. Time is not measured; it is modelled.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from numpy.typing import NDArray

from throttllem.calibrate.errors import Errors, held_out
from throttllem.calibrate.fit import Fit, fit, with_constants
from throttllem.calibrate.prior import CLOCK_POWER, around
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Model
from tools.fidelity.a100_plots import COLOURS
from tools.fidelity.section import ErrorRow, Plot, Section, Target

FILE = Path("measured") / "a40_llama3_8b_power.csv"
GPU, MODEL = "a40-48gb", "llama-3-8b"
BATCH_MAX, PREFILL_MAX_TOKENS, CONTEXT_TOKENS = 256, 4096, 1000
"""Where a cell has no upper edge, and what every running request is taken to hold: assumptions, not published."""
SAMPLES = 3
"""Per axis of a cell."""
_SMALL_TOKENS = 100
"""Below this a cell without lower edge is a batch that only decodes, or nearly."""
_SCATTER = 0.05
FEW = ((285.0, 435.0), (900.0, 1050.0), (1357.5, 1515.0))
"""The only clock ranges that one fit may see."""
_SPAN_W = 15
_LOW_MHZ, _HIGH_MHZ = 210, 1740
_LOADS = ((64, 0, "batch 64"), (192, 0, "batch 192"), (8, 512, "512 prompt tokens"), (8, 2048, "2,048 prompt tokens"))
"""Decode batch, prefill tokens and name of what a plot shows beside batch 8."""
Edges = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Mean watts over all batches between these edges; None is the end of the range."""

    clock_mhz: Edges
    prefill_tokens: Edges
    decode_batch: Edges
    power_w: float


def read_cells(data: Path) -> list[Cell]:
    """31 cells over 18,000 batches (JonnyKong/vidur)."""
    return [
        Cell(clock_mhz=(a, b), prefill_tokens=(c, d), decode_batch=(e, f), power_w=watts)
        for a, b, c, d, e, f, _, watts in pl.read_csv(data / FILE).iter_rows()
    ]


def section(data: Path, catalogue: Catalogue) -> Section:
    """Watts of every cell: shipped constants, and refits with ranges of the clock left out."""
    cells, gpu, model = read_cells(data), catalogue.gpu(GPU), catalogue.model(MODEL)
    whole = refit(gpu, model, cells)
    hidden = [cell for cell in cells if cell.clock_mhz not in FEW]
    few = refit(gpu, model, [cell for cell in cells if cell.clock_mhz in FEW])
    found = {
        "nothing": errors(gpu, model, cells),
        "each clock range": held_out(
            cells,
            lambda cell: cell.clock_mhz,
            lambda seen: refit(gpu, model, seen).gpu,
            lambda fitted, chosen: errors(fitted, model, chosen),
        ),
        "all clock ranges but three": errors(few.gpu, model, hidden),
    }
    return Section(
        title="A40 serving Llama-3-8B: watts by clock, prefill and batch",
        text=_TEXT,
        rows=tuple(ErrorRow(what="watts", held_out=name, errors=Errors.of(found_)) for name, found_ in found.items()),
        targets=_targets(gpu, model, cells, Errors.of(found["each clock range"])),
        plots=_plots(gpu, model, cells),
        constants={GPU: {fitted.constant.path: fitted.value for fitted in whole.constants}},
    )


def refit(gpu: Gpu, model: Model, cells: Sequence[Cell]) -> Fit:
    """The power constants from those cells, from generic priors."""
    constants = around(gpu, CLOCK_POWER)
    blank = with_constants(gpu, {constant.path: constant.start for constant in constants})
    return fit(blank, constants, lambda moved: errors(moved, model, cells) / _SCATTER)


def errors(gpu: Gpu, model: Model, cells: Sequence[Cell]) -> NDArray[np.float64]:
    """Signed relative errors in watts."""
    engine = EnginePhysics(gpu, model, 1)
    return np.array([watts(engine, cell) / cell.power_w - 1 for cell in cells])


def watts(engine: EnginePhysics, cell: Cell) -> float:
    """Mean of the law over the cell: clocks evenly, tokens and requests evenly by their logarithm."""
    return float(np.mean([_watts(engine, *point) for point in _points(cell)]))


def _points(cell: Cell) -> Iterator[tuple[float, int, int]]:
    """Clock, decode batch and prefill tokens."""
    low, high = cell.clock_mhz
    for clock in _evenly(low or _LOW_MHZ, high or _HIGH_MHZ, lambda part: part):
        for batch in _evenly(cell.decode_batch[0] or 1, cell.decode_batch[1] or BATCH_MAX, math.exp):
            for tokens in _prefills(*cell.prefill_tokens):
                yield clock, round(batch), round(tokens)


def _evenly(low: float, high: float, inverse: Callable[[float], float]) -> list[float]:
    """The middles of `SAMPLES` equal parts."""
    start, stop = (math.log(low), math.log(high)) if inverse is math.exp else (low, high)
    return [inverse(start + (stop - start) * (part + 0.5) / SAMPLES) for part in range(SAMPLES)]


def _prefills(low: float | None, high: float | None) -> list[float]:
    """Without a lower edge some batches have no prompt: half of them in a small cell, a quarter in a large one."""
    if low is not None:
        return _evenly(low, high or PREFILL_MAX_TOKENS, math.exp)
    if high is not None and high < _SMALL_TOKENS:
        return [0.0, high / 2]
    return [0.0, *_evenly(1, high or PREFILL_MAX_TOKENS, math.exp)]


def _watts(engine: EnginePhysics, clock_mhz: float, batch: int, prefill_tokens: int) -> float:
    return engine.iteration(clock_mhz, batch, batch * CONTEXT_TOKENS, prefill_tokens, prefill_tokens**2 / 2)[1]


def spans(cells: Sequence[Cell], figures: Sequence[float]) -> dict[Edges, float]:
    """Watts by which the fullest cell of a clock range exceeds the emptiest (the last and the first of the file)."""
    ends: dict[Edges, list[float]] = {}
    for cell, figure in zip(cells, figures, strict=True):
        ends.setdefault(cell.clock_mhz, []).append(figure)
    return {clock: found[-1] - found[0] for clock, found in ends.items() if len(found) > 1}


def _both_spans(gpu: Gpu, model: Model, cells: Sequence[Cell]) -> tuple[dict[Edges, float], dict[Edges, float]]:
    """Measured, and the law's."""
    engine = EnginePhysics(gpu, model, 1)
    return spans(cells, [cell.power_w for cell in cells]), spans(cells, [watts(engine, cell) for cell in cells])


def _targets(gpu: Gpu, model: Model, cells: Sequence[Cell], ranges: Errors) -> tuple[Target, ...]:
    measured, ours = _both_spans(gpu, model, cells)
    ends = [(measured[clock], ours[clock]) for clock in (min(measured, key=_middle), max(measured, key=_middle))]
    return (
        Target(
            what="watts, each clock range left out: mean",
            limit="7 %",
            found=f"{ranges.mean:.1%}",
            met=ranges.mean <= 0.07,
        ),
        Target(
            what="watts of the fullest cell less the emptiest, at the lowest and the highest clocks",
            limit=" and ".join(f"{wanted:+.0f} W +- {_SPAN_W}" for wanted, _ in ends),
            found=" and ".join(f"{found:+.0f} W" for _, found in ends),
            met=all(abs(found - wanted) <= _SPAN_W for wanted, found in ends),
        ),
    )


def _middle(clock_mhz: Edges) -> float:
    return ((clock_mhz[0] or _LOW_MHZ) + (clock_mhz[1] or _HIGH_MHZ)) / 2


def _plots(gpu: Gpu, model: Model, cells: Sequence[Cell]) -> tuple[Plot, ...]:
    return (
        Plot(
            name="a40-watts",
            caption="A40 serving Llama-3-8B: mean watts of the 31 cells, and what the work adds to them at each clock.",
            draw=partial(_draw, gpu, model, cells),
        ),
    )


def _draw(gpu: Gpu, model: Model, cells: Sequence[Cell], figure: Figure) -> None:
    engine = EnginePhysics(gpu, model, 1)
    left, right = figure.subplots(1, 2)
    measured, ours = [cell.power_w for cell in cells], [watts(engine, cell) for cell in cells]
    points = left.scatter(measured, ours, c=[_middle(cell.clock_mhz) for cell in cells], cmap="cividis", s=24)
    left.plot([80, 300], [80, 300], color="grey", linewidth=1)
    left.set(xlabel="measured (W)", ylabel="physics (W)", title="cells")
    figure.colorbar(points, ax=left, label="clock (MHz)")
    clocks = [clock for clock in gpu.clocks_mhz if clock % 30 == 0]
    empty = [_watts(engine, clock, 8, 0) for clock in clocks]
    for colour, (batch, tokens, label) in zip(COLOURS, _LOADS, strict=False):
        added = [_watts(engine, clock, batch, tokens) - base for clock, base in zip(clocks, empty, strict=True)]
        right.plot(clocks, added, color=colour, label=label)
    added_w = spans(cells, measured)
    right.plot([_middle(clock) for clock in added_w], list(added_w.values()), "o", color="black", label="measured")
    right.set(xlabel="clock (MHz)", ylabel="added to batch 8 (W)", title="work's part of the power")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)


_TEXT = (
    "Mean watts of one A40 while serving Llama-3.1-8B, in 31 cells of clock, prefill tokens and decode batch. The law "
    "is averaged over a cell: 3 clocks evenly, 3 batch sizes and 3 prompt sizes evenly by logarithm. Cells without "
    "upper edge end at batch 256 and 4,096 prompt tokens; where a cell has no lower edge a quarter of its batches "
    "(half, below 100 tokens) have no prompt; every running request holds 1,000 tokens. None of this is published. "
    "Nor is any time, so seconds come from the data sheet and the A100's efficiencies; power constants alone are "
    "fitted.\n\n"
    "The part of the power that depends on the work comes out as measured, without a term for it: below 600 MHz a "
    "prompt makes the iteration compute-bound, the memory rests, and watts *fall* by some 10; above 1,200 MHz tensor "
    "cores at high voltage add 50 W and more, until the limit of 300 W. At high clocks small decode batches "
    "(up to 80 requests) draw 5 % less than the law and large ones 3 to 5 % more: batches are surely not spread evenly "
    "inside a cell, and a longer or shorter context moves them apart. At the limit the mean is 292 W, for not every "
    "iteration of the cell is held."
)
