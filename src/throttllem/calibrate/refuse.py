"""Measurements that no law can be fitted to, refused with the reason: too few, too much alike, or contradictory.

Everything here looks at the points before a fit, but `check_fit`, which looks at what is left after it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.bands import bands
from throttllem.calibrate.points import Point
from throttllem.learn.profile import ProfileError, place
from throttllem.physics.catalogue import Gpu, Model
from throttllem.physics.engine import EnginePhysics, ModelDoesNotFit

FEWEST_CLOCKS = 3
"""The clock law bends at a knee: two clocks cannot tell where."""
FEWEST_BATCHES = 2
"""One batch size cannot tell the cost of a request from that of an iteration."""
FEWEST_IN_GROUP = 5
"""The median of five measurements bears two bad ones."""
REPEAT_RATIO = 1.4
"""Most that one point's measurements may lie apart: five standard deviations at 5 % scatter of each."""
LIMIT_RATIO = 1.2
"""Most that watts may lie above the power limit: a governor overshoots for moments, not by more (four times 5 %)."""
SECONDS = (1e-6, 1e4)
"""Of an iteration: less than a kernel's launch, and more than three hours, are slips of the unit."""
RISING_SLOPE = 0.05
"""Seconds like clock^0.05 or more: never physical, the law's own slope being between 0 and -1."""
WORST_MEDIAN, WORST_P90 = 0.25, 0.5
"""A law that misses half of its own points, or a tenth of them, by this much describes something else."""
SHOWN = 5


def check_enough(points: Sequence[Point], file: Path) -> None:
    """Raises ProfileError for too few clocks, batch sizes, or rows at them."""
    for what, values, fewest in (
        ("clocks", [point.clock_mhz for point in points], FEWEST_CLOCKS),
        ("batch sizes", [point.batch for point in points], FEWEST_BATCHES),
    ):
        distinct = sorted(set(values))
        if len(distinct) < fewest:
            raise ProfileError(
                f"{file}: {len(distinct)} of the {fewest} distinct {what} that a fit needs ({distinct[0]}"
                f"{' and ' + str(distinct[1]) if len(distinct) > 1 else ''}); measure more, the ends first"
            )
        groups = len(set(bands(values, most=len(distinct), fewest=FEWEST_IN_GROUP).values()))
        if groups < fewest:
            raise ProfileError(
                f"{file}: {len(points)} rows are too few: a fit needs {fewest} groups of {what} with at least "
                f"{FEWEST_IN_GROUP} rows each, and there are {groups}; measure more rows"
            )


def check_gpu(points: Sequence[Point], gpu: Gpu, model: Model, file: Path) -> None:
    """Raises ProfileError for engine sizes, clocks, seconds and watts that `gpu` cannot have."""
    remedy = "or name a GPU that can with --like; --catalogue may bring it, with its data sheet's figures"
    for tp in sorted({point.tp for point in points}):
        try:
            EnginePhysics(gpu, model, tp)
        except ModelDoesNotFit as error:
            raise ProfileError(f"{file}: tp {tp}: {error}, {remedy}") from error
    for point in points:
        if wrong := _impossible(point, gpu):
            raise ProfileError(f"{file}, {place(file, point.row)}: {wrong}: correct it, {remedy}")


def _impossible(point: Point, gpu: Gpu) -> str | None:
    low, high = gpu.clock_min_mhz, gpu.clock_max_mhz
    if not low <= point.clock_mhz <= high:
        return f"{point.clock_mhz} MHz, and {gpu.name} runs at {low} to {high} MHz"
    if not SECONDS[0] <= point.seconds <= SECONDS[1]:
        return f"{point.seconds:g} seconds, and an iteration takes {SECONDS[0]:g} to {SECONDS[1]:g}"
    limit_w, idle_w = gpu.power.limit_w * point.tp, gpu.power.idle_w * point.tp
    if point.watts > LIMIT_RATIO * limit_w:
        return f"{point.watts:g} W, and the power limit of {point.tp} x {gpu.name} is {limit_w:g} W"
    if point.watts < idle_w / LIMIT_RATIO:
        return f"{point.watts:g} W of all GPUs together, and {point.tp} x {gpu.name} draw {idle_w:g} W idle"
    return None


def check_repeats(points: Sequence[Point], file: Path) -> None:
    """Raises ProfileError where one point was measured several times at values further apart than scatter allows."""
    repeats: dict[tuple[float, ...], list[Point]] = defaultdict(list)
    for point in points:
        repeats[point.tp, *point.asked].append(point)
    for same in repeats.values():
        for what in ("seconds", "watts"):
            ranked = sorted(same, key=lambda point: float(getattr(point, what)))
            least, most = (float(getattr(end, what)) for end in (ranked[0], ranked[-1]))
            if most > REPEAT_RATIO * least:
                raise ProfileError(
                    f"{file}: {place(file, ranked[0].row)} and {place(file, ranked[-1].row)} contradict each other: "
                    f"the same iteration measured at {least:g} and {most:g} {what}; scatter explains a factor of "
                    f"{REPEAT_RATIO} at most. Remove what is wrong"
                )


def check_slope(points: Sequence[Point], top_s: NDArray[np.float64], file: Path) -> None:
    """Raises ProfileError where seconds fall as the clock falls.

    `top_s`: what the law says of each point's load at the top clock; seconds over it are compared within engine sizes.
    """
    slowdown = np.log([point.seconds for point in points]) - np.log(top_s)
    for tp in sorted({point.tp for point in points}):
        mine = [index for index, point in enumerate(points) if point.tp == tp]
        clock = np.log([points[index].clock_mhz for index in mine])
        away, slower = clock - clock.mean(), slowdown[mine] - slowdown[mine].mean()
        if not (spread := float(away @ away)):
            continue
        slope = float(away @ slower) / spread
        scatter = float(np.std(slower - slope * away))
        if slope > max(RISING_SLOPE, 3 * scatter / np.sqrt(spread)):
            rising = np.maximum(away * slower, 0.0)
            raise ProfileError(
                f"{file}: at tp {tp} seconds fall as the clock falls (like clock^{slope:.2f}), which no GPU does; "
                f"worst: {_worst([points[index] for index in mine], rising, file)}. Are the columns right?"
            )


def check_fit(points: Sequence[Point], relative: NDArray[np.float64], file: Path) -> None:
    """Raises ProfileError where the fitted law misses its own points; `relative` errors: (points, (seconds, watts))."""
    for what, errors in zip(("seconds", "watts"), relative.T, strict=True):
        for share, quantile, allowed in (("half", 0.5, WORST_MEDIAN), ("a tenth", 0.9, WORST_P90)):
            if (found := float(np.quantile(np.abs(errors), quantile))) > allowed:
                raise ProfileError(
                    f"{file}: after the fit {share} of the {what} are off by {found:.0%} or more (allowed: "
                    f"{allowed:.0%}), so the points contradict each other or the law; worst: "
                    f"{_worst(points, errors, file)}"
                )


def _worst(points: Sequence[Point], errors: NDArray[np.float64], file: Path) -> str:
    ranked = np.argsort(-np.abs(errors), kind="stable")[:SHOWN]
    return ", ".join(place(file, points[index].row) for index in ranked.tolist())
