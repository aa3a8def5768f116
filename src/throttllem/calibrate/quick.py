"""A performance table from a quick profile: the law calibrated on a few batches at three or four clocks, tabulated.

Knows nothing of how the profile was measured, nor of files but its name.
"""

# Rows that were measured together (a batch at one clock) are nearly copies of each other and share one reading of the
# energy counter: each such group counts once, with its median seconds.
#
# A fit builds the law of every clock of the GPU in each step; a coarser ladder is as good, as the law interpolates
# between clocks only at the power limit.
#
# The errors that the table states are held out: every inner clock and every inner batch size is left out in turn. The
# ends are not, as the table is never used beyond them: its clocks begin at the lowest that was measured. The error of
# the table's cells is added to them (as independent errors are).

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from throttllem.calibrate.calibration import FOLD_ROWS, MOST_BATCH_FOLDS, Progress, Task, errors, fit_points
from throttllem.calibrate.errors import Score
from throttllem.calibrate.points import Point, bands, points_of
from throttllem.calibrate.validation import FEWEST_IN_GROUP, check_held_out
from throttllem.core.forecast.performance_table import Calibrated, PerformanceTable
from throttllem.core.types import EngineSpec
from throttllem.physics.catalogue import Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Model
from throttllem.profiling.tabulate import cell_errors, tabulate

FIT_CLOCKS = 24
TOGETHER = ("point", "clock_mhz", "batch", "prefill_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickLaw:
    """The calibrated GPU, the clocks at which it was measured, and the law's errors by what was held out of the fit."""

    gpu: Gpu
    like: str
    clocks_mhz: tuple[int, ...]
    scores: tuple[Score, ...]

    @property
    def basis(self) -> Calibrated:
        """What the law states: the larger error of what was held out, where anything was."""
        held_out = self.scores[1:] or self.scores
        return Calibrated(
            clocks_mhz=self.clocks_mhz,
            seconds_error=max(score.seconds.p90 for score in held_out),
            watts_error=max(score.watts.p90 for score in held_out),
        )

    @property
    def mean_errors(self) -> tuple[float, float]:
        """Mean relative errors of held-out seconds and watts, the larger of the splits."""
        held_out = self.scores[1:] or self.scores
        return max(score.seconds.mean for score in held_out), max(score.watts.mean for score in held_out)

    def to_json(self) -> dict[str, object]:
        """What the table states of itself, and the errors; plain values in the fields' own names."""
        basis, scores = asdict(self.basis), [asdict(score) for score in self.scores]
        return {"gpu": self.gpu.name, "like": self.like, "basis": "calibrated", **basis, "scores": scores}


def quick_law(
    profile: pl.DataFrame, like: Gpu, model: Model, file: Path, on_progress: Progress = lambda *_: None
) -> QuickLaw:
    """Calibrate the law of `like` on a checked quick profile of one engine size.

    Raises ProfileError (file, reason, rows) for too few clocks or batch sizes, and where the law does not follow.
    """
    points = points_of(_together(profile), model, file)
    task, best = fit_points(points, _coarse(like), model, file)
    folds = [(name, left_out) for name, groups in _splits(points).items() for left_out in groups]
    found: dict[str, list[NDArray[np.float64]]] = {}
    for done, (name, left_out) in enumerate(folds):
        on_progress(1 + done, 1 + len(folds))
        found.setdefault(name, []).append(_held_out(task, points, left_out))
    scores = [Score.of("nothing", errors(best.gpu, model, points))]
    for name, parts in found.items():
        relative = np.concatenate(parts)
        check_held_out(name, relative, file)
        scores.append(Score.of(name, relative))
    on_progress(1, 1)
    clocks = tuple(sorted({point.clock_mhz for point in points}))
    ladder = {"clock_step_mhz": like.clock_step_mhz}
    return QuickLaw(gpu=best.gpu.model_copy(update=ladder), like=like.name, clocks_mhz=clocks, scores=tuple(scores))


def quick_table(
    law: QuickLaw, model: Model, spec: EngineSpec, on_progress: Progress = lambda *_: None
) -> PerformanceTable:
    """The law at every clock from the lowest that was measured on, over the batch, KV cache and prefill of `spec`."""
    clocks = tuple(mhz for mhz in law.gpu.clocks_mhz if mhz >= law.clocks_mhz[0])
    engine, spec = EnginePhysics(law.gpu, model, spec.tp), replace(spec, clocks_mhz=clocks)
    table = tabulate(engine, spec, law.basis, on_progress)
    of_cells = np.quantile(np.abs(cell_errors(table, engine, spec)), 0.9, axis=0).tolist()
    stated = replace(
        law.basis,
        seconds_error=math.hypot(law.basis.seconds_error, of_cells[0]),
        watts_error=math.hypot(law.basis.watts_error, of_cells[1]),
    )
    return replace(table, calibrated=stated)


def _coarse(gpu: Gpu) -> Gpu:
    """The GPU with about FIT_CLOCKS clocks."""
    span_mhz = gpu.clock_max_mhz - gpu.clock_min_mhz
    steps_mhz = range(max(gpu.clock_step_mhz, span_mhz // FIT_CLOCKS), span_mhz + 1)
    return gpu.model_copy(update={"clock_step_mhz": next(step for step in steps_mhz if span_mhz % step == 0)})


def _together(profile: pl.DataFrame) -> pl.DataFrame:
    keys = [pl.col(name) for name in TOGETHER if name in profile.columns]
    middle = [pl.col("seconds").median(), pl.col("watts").mean(), pl.col("kv_blocks").median().round().cast(pl.Int64)]
    others = pl.exclude(*TOGETHER, "seconds", "watts", "kv_blocks").first()
    return profile.group_by(keys, maintain_order=True).agg(*middle, others)


def _splits(points: Sequence[Point]) -> dict[str, list[set[int]]]:
    """By name, the rows of each group that is left out: those between the ends."""
    clocks = bands([point.clock_mhz for point in points], len(points), FEWEST_IN_GROUP)
    batches = bands([point.batch for point in points], MOST_BATCH_FOLDS, FEWEST_IN_GROUP)
    return {
        "clocks between the ends": _inner(points, [clocks[point.clock_mhz] for point in points]),
        "batch sizes between the ends": _inner(points, [batches[point.batch] for point in points]),
    }


def _inner(points: Sequence[Point], groups: Sequence[int]) -> list[set[int]]:
    rows = [point.row for point in points]
    return [
        {row for row, group in zip(rows, groups, strict=True) if group == inner} for inner in sorted(set(groups))[1:-1]
    ]


def _held_out(task: Task, points: Sequence[Point], left_out: set[int]) -> NDArray[np.float64]:
    """Relative errors at the rows left out, of a fit to the others."""
    fitted = task.fit([point for point in points if point.row not in left_out], FOLD_ROWS)
    return errors(fitted.gpu, task.model, [point for point in points if point.row in left_out])
