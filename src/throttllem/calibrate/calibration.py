"""From measured iterations of one model on one kind of GPU to that GPU's constants, and their held-out errors.

Knows nothing of files but the profile's name, which errors mention.
"""

# The method (docs/calibrate.md).
#
# Constants that the measurements can move are fitted; all others stay those of a known GPU (`like`). Residuals are
# logarithms of law over measurement, in standard deviations of the measurement; each constant has a prior around its
# value in `like`. The scatter that scales the residuals is unknown, so a first fit with published figures finds it, and
# a second one uses it. A fit follows slopes, and a memory knee below all measured clocks has none: a second start with
# the knee in the middle of the clocks is taken where it fits clearly better.
#
# The first score is of what the fit has seen. The errors that count are held out: every clock, batch size and engine
# size is left out in turn, fitted without (few rows, as there may be twenty such fits) and predicted.

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.errors import Score, held_out
from throttllem.calibrate.fit import Constant, Fit, Fitted, fit, with_constants
from throttllem.calibrate.points import Point, bands, sample
from throttllem.calibrate.prior import around, priors
from throttllem.calibrate.validation import (
    FEWEST_IN_GROUP,
    check_engines,
    check_enough,
    check_figures,
    check_fit,
    check_held_out,
    check_repeats,
    check_seconds,
    check_units,
    check_watts,
    far_from_prior,
    watts_of_one_gpu,
)
from throttllem.physics.catalogue import Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Model
from throttllem.profiling.profile import ProfileError

Progress = Callable[[int, int], None]
"""Called with (fits done, fits in all)."""
Relative = NDArray[np.float64]
"""Signed relative errors of seconds and of watts: one row per point."""

MOST_ROWS = 1500
FOLD_ROWS = 400
"""Of each held-out fit, evenly chosen."""
MOST_CLOCK_FOLDS = 8
MOST_BATCH_FOLDS = 6
SCATTER = (0.04, 0.05)
"""Of measured seconds and watts, until the first fit has found it (published A100 and H100 measurements)."""
LEAST_SCATTER = 0.01
CLEARLY = 0.0005
"""The second start is taken if its mean absolute logarithm is smaller by this much."""
SENSITIVE = 0.5
"""A constant is not fitted if its spread moves all residuals together by less than half a standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The calibrated GPU. `fitted` are the constants that moved; all others are those of `like`.

    `warnings` are sentences about suspicious measurements that were not refused.
    """

    gpu: Gpu
    like: str
    fitted: tuple[Fitted, ...]
    scores: tuple[Score, ...]
    rows: int
    rows_fitted: int
    warnings: tuple[str, ...] = ()

    def constants(self) -> Iterator[tuple[str, float, Fitted | None]]:
        """Every constant that can be fitted: path, value, and its fit (None: it is that of `like`)."""
        moved = {one.constant.path: one for one in self.fitted}
        for path in priors(self.gpu):
            law, _, name = path.partition(".")
            yield path, float(getattr(getattr(self.gpu, law), name)), moved.get(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The common inputs of all fits of one calibration."""

    like: Gpu
    model: Model
    constants: tuple[Constant, ...]
    file: Path
    scatter: tuple[float, float] = SCATTER

    def fit(self, points: Sequence[Point], most: int) -> Fit:
        """To an even sample of at most `most` points. Outliers pull with constant force only.

        Raises ProfileError where no constants can be found.
        """
        chosen = sample(points, most)
        try:
            return fit(self.like, self.constants, lambda gpu: self.residuals(gpu, chosen), robust=True)
        except ValueError as error:
            raise ProfileError(
                f"{self.file}: {error}. Remove rows that contradict each other, or name a nearer GPU with --like"
            ) from error

    def residuals(self, gpu: Gpu, points: Sequence[Point]) -> NDArray[np.float64]:
        """Logarithms of law over measurement, in standard deviations of the measurement."""
        return (np.log1p(errors(gpu, self.model, points)) / self.scatter).ravel()


def calibrate_points(
    points: Sequence[Point], like: Gpu, model: Model, file: Path, on_progress: Progress = lambda *_: None
) -> Calibration:
    """Fit, and score what is held out. `file` names the profile in errors.

    Raises ProfileError (file, reason, rows) for measurements that are too few, contradictory, not this GPU's, or that
    the law does not follow.
    """
    splits = dict(_splits(points))
    done, total = 0, 1 + sum(len({group(point) for point in points}) for group in splits.values())
    on_progress(done, total)
    task, best = fit_points(points, like, model, file)

    def fold(left: list[Point]) -> Gpu:
        nonlocal done
        done += 1
        on_progress(done, total)
        return task.fit(left, FOLD_ROWS).gpu

    scores = [Score.of("nothing", errors(best.gpu, model, points))]
    for name, group in splits.items():
        relative = held_out(points, group, fold, lambda gpu, left: errors(gpu, model, left))
        # No other row shows how the GPUs of a left-out size are connected: an error there is no fault of the rows.
        if name != "each tp":
            check_held_out(name, relative, file)
        scores.append(Score.of(name, relative))
    on_progress(total, total)
    return Calibration(
        gpu=best.gpu,
        like=like.name,
        fitted=best.constants,
        scores=tuple(scores),
        rows=len(points),
        rows_fitted=min(len(points), MOST_ROWS),
        warnings=(
            *watts_of_one_gpu(points, _law(like, model, points)[:, 1], like.name),
            *far_from_prior(best.constants, like.name),
        ),
    )


def fit_points(points: Sequence[Point], like: Gpu, model: Model, file: Path) -> tuple[Task, Fit]:
    """The fit to all points, and the inputs of further fits. Raises ProfileError as `calibrate_points`."""
    check(points, like, model, file)
    clocks = sorted({point.clock_mhz for point in points})
    task, best, misfit = _fitted_from(like, points, model, file)
    middle = with_constants(like, {"time.memory_knee_mhz": math.sqrt(clocks[0] * clocks[-1])})
    other_task, other, other_misfit = _fitted_from(middle, points, model, file)
    if other_misfit < misfit - CLEARLY:
        task, best = other_task, other
    check_fit(points, errors(best.gpu, model, points), file)
    return task, replace(best, constants=tuple(_knee_error(one, clocks) for one in best.constants))


def _fitted_from(like: Gpu, points: Sequence[Point], model: Model, file: Path) -> tuple[Task, Fit, float]:
    """The inputs of fits that start at `like`, the fit, and the mean absolute logarithm of its residuals."""
    task = Task(like=like, model=model, constants=tuple(_bounded(like)), file=file)
    task = replace(task, constants=tuple(_sensitive(task, sample(points, FOLD_ROWS))))
    task = replace(task, scatter=_scatter(task, points))
    best = task.fit(points, MOST_ROWS)
    return task, best, float(np.abs(np.log1p(errors(best.gpu, model, points))).mean())


def check(points: Sequence[Point], like: Gpu, model: Model, file: Path) -> None:
    """Raise ProfileError (file, rows, reason, remedy) for what can be refused before a fit."""
    check_enough(points, file)
    check_engines(points, like, model, file)
    measured = np.log([(point.seconds, point.watts) for point in points])
    law = np.log(_law(like, model, points))
    check_units(measured, law, like.name, file)
    check_figures(points, like, file)
    check_repeats(points, file)
    top = np.log(_law(like, model, [point._replace(clock_mhz=like.clock_max_mhz) for point in points]))
    check_seconds(points, measured, top, file)
    check_watts(points, measured, law, top, like.name, file)


def errors(gpu: Gpu, model: Model, points: Sequence[Point]) -> Relative:
    """Relative errors of the law at every point."""
    measured = np.array([(point.seconds, point.watts) for point in points])
    return np.asarray(_law(gpu, model, points) / measured - 1, dtype=float)


def _law(gpu: Gpu, model: Model, points: Sequence[Point]) -> NDArray[np.float64]:
    """Seconds and watts of every point."""
    engines = {tp: EnginePhysics(gpu, model, tp) for tp in {point.tp for point in points}}
    return np.array([engines[point.tp].iteration(*point.arguments) for point in points])


def _bounded(like: Gpu) -> Iterator[Constant]:
    """The priors around `like`; static watts stay below what the power limit leaves of the idle watts."""
    for constant in around(like, priors(like), like):
        if constant.path == "power.static_w":
            yield replace(constant, high=0.9 * (like.power.limit_w - like.power.idle_w))
        else:
            yield constant


def _sensitive(task: Task, points: Sequence[Point]) -> Iterator[Constant]:
    """Constants that these points can move: those of prefill need prompts, those of all-reduce several GPUs."""
    before = task.residuals(task.like, points)
    for constant in task.constants:
        moved = min(constant.start * np.exp(constant.spread), 0.999 * constant.high)
        down = max(constant.start * np.exp(-constant.spread), 1.001 * constant.low)
        for value in (moved, down):
            after = task.residuals(with_constants(task.like, {constant.path: float(value)}), points)
            if np.linalg.norm(after - before) > SENSITIVE:
                yield constant
                break


def _scatter(task: Task, points: Sequence[Point]) -> tuple[float, float]:
    """Standard deviations of seconds and watts about a first fit: half of them lie within 0.67 of it.

    The fit itself reduces the scatter: n points about p moved constants scatter like n - p.
    """
    chosen = sample(points, FOLD_ROWS)
    first = task.fit(chosen, FOLD_ROWS)
    middle = np.median(np.abs(errors(first.gpu, task.model, chosen)), axis=0) / 0.6745
    found = []
    for law, size, assumed in zip(("time.", "power."), middle.tolist(), SCATTER, strict=True):
        mine = [one for one in first.constants if one.constant.path.startswith(law)]
        moved = sum(1 - (one.error / one.constant.spread) ** 2 for one in mine)
        left = len(chosen) - moved
        found.append(max(LEAST_SCATTER, size * (len(chosen) / left) ** 0.5) if left > moved else assumed)
    return found[0], found[1]


def _knee_error(fitted: Fitted, clocks: Sequence[int]) -> Fitted:
    """The uncertainty of a knee is at least half of the gap between the clocks around it.

    The fit estimates uncertainty from the curvature at the optimum, which ignores that a knee may lie anywhere there.
    """
    if not fitted.constant.path.endswith("knee_mhz"):
        return fitted
    nearest = min(range(len(clocks)), key=lambda index: abs(clocks[index] - fitted.value))
    beside = clocks[max(nearest - 1, 0) : nearest + 2]
    gap_mhz = max(above - below for below, above in pairwise(beside))
    return replace(fitted, error=max(fitted.error, gap_mhz / 2 / fitted.value))


def _splits(points: Sequence[Point]) -> Iterator[tuple[str, Callable[[Point], Hashable]]]:
    clocks = bands([point.clock_mhz for point in points], MOST_CLOCK_FOLDS, FEWEST_IN_GROUP)
    batches = bands([point.batch for point in points], MOST_BATCH_FOLDS, FEWEST_IN_GROUP)
    sizes = {point.tp: point.tp for point in points}
    yield _named("clock", clocks), lambda point: clocks[point.clock_mhz]
    yield _named("batch size", batches), lambda point: batches[point.batch]
    if len(sizes) > 1:
        yield _named("tp", sizes), lambda point: point.tp


def _named(what: str, groups: dict[int, int]) -> str:
    count = len(set(groups.values()))
    return f"each {what}" if count == len(groups) else f"each of {count} bands of {what}s"
