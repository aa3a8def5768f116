"""Measurements that no law can be fitted to, refused with the reason: too few, too much alike, or contradictory.

Everything here looks at the points before a fit, but `check_fit` and `check_held_out`, which look at what a fit missed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.bands import bands
from throttllem.calibrate.points import Point, refuse_rows
from throttllem.physics.catalogue import Gpu, Model
from throttllem.physics.engine import EnginePhysics, ModelDoesNotFit
from throttllem.physics.load import kv_bytes_per_token
from throttllem.profiling.profile import ProfileError, place

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
MEMORY_RATIO = 1.1
"""Of weights and KV over the whole memory of `like`: makers and drivers count 80 GB as 79.6 to 85.9e9 bytes."""
WORST_MEDIAN, WORST_P90 = 0.25, 0.5
"""A law that misses half of its own points, or a tenth of them, by this much describes something else."""
HELD_OUT_MEDIAN, HELD_OUT_P90 = 0.2, 0.4
"""Of clocks or batch sizes left out. Of eight GPUs of the laws' kind, at three clocks and 36 rows with 10 % scatter,
the worst had 10 and 24 %; watts of other rows had 32 and 58 %, seconds of other rows 60 and 233 %."""
SHOWN = 5
_REMEDY = "or name a GPU that can with --like, or correct its data sheet with --sheet"


def check_enough(points: Sequence[Point], file: Path) -> None:
    """Raises ProfileError for too few clocks, batch sizes, or rows at them."""
    axes = (
        ("clocks", [point.clock_mhz for point in points], FEWEST_CLOCKS),
        ("batch sizes", [point.batch for point in points], FEWEST_BATCHES),
    )
    for what, values, fewest in axes:
        distinct = sorted(set(values))
        if len(distinct) < fewest:
            raise ProfileError(
                f"{file}: {len(distinct)} of the {fewest} distinct {what} that a fit needs ({distinct[0]}"
                f"{' and ' + str(distinct[1]) if len(distinct) > 1 else ''}); measure more, the ends first"
            )
    for what, values, fewest in axes:
        groups = len(set(bands(values, most=len(set(values)), fewest=FEWEST_IN_GROUP).values()))
        if groups < fewest:
            raise ProfileError(
                f"{file}: {len(points)} rows are too few: a fit needs {fewest} groups of {what} with at least "
                f"{FEWEST_IN_GROUP} rows each, and there are {groups}; measure more rows"
            )


def check_engines(points: Sequence[Point], gpu: Gpu, model: Model, file: Path) -> None:
    """Raises ProfileError for engine sizes, clocks and KV caches that `gpu` cannot have."""
    for tp in sorted({point.tp for point in points}):
        try:
            EnginePhysics(gpu, model, tp)
        except ModelDoesNotFit as error:
            raise ProfileError(f"{file}: tp {tp}: {error}, {_REMEDY}") from error
    low, high = gpu.clock_min_mhz, gpu.clock_max_mhz
    wrong = [
        (point.row, f"{point.clock_mhz:.6g} MHz, and {gpu.name} runs at {low} to {high} MHz")
        for point in points
        if not low <= point.clock_mhz <= high
    ]
    refuse_rows(wrong, len(points), file, f"correct it, {_REMEDY}")
    room = {tp: _most_tokens(gpu, model, tp) for tp in {point.tp for point in points}}
    wrong = [
        (
            point.row,
            f"{held:.6g} tokens in the KV cache, and the whole memory of {point.tp} x {gpu.name} holds "
            f"{room[point.tp]:.6g} of {model.name} beside its weights",
        )
        for point in points
        if (held := point.kv_tokens + point.prefill_tokens) > room[point.tp]
    ]
    refuse_rows(wrong, len(points), file, f"correct kv_blocks, block_tokens or prefill_tokens, {_REMEDY}")


def _most_tokens(gpu: Gpu, model: Model, tp: int) -> float:
    return max(0.0, MEMORY_RATIO * gpu.memory_bytes - model.weight_bytes / tp) / kv_bytes_per_token(model, tp)


def check_figures(points: Sequence[Point], gpu: Gpu, file: Path) -> None:
    """Raises ProfileError for seconds and watts that `gpu` cannot have."""
    wrong = [(point.row, why) for point in points if (why := _impossible(point, gpu))]
    refuse_rows(wrong, len(points), file, f"correct it, {_REMEDY}")


def _impossible(point: Point, gpu: Gpu) -> str | None:
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


def check_fit(points: Sequence[Point], relative: NDArray[np.float64], file: Path) -> None:
    """Raises ProfileError where the fitted law misses its own points; `relative` errors: (points, (seconds, watts))."""
    for what, errors in zip(("seconds", "watts"), relative.T, strict=True):
        if missed := _missed(what, errors, WORST_MEDIAN, WORST_P90):
            ranked = np.argsort(-np.abs(errors), kind="stable")[:SHOWN]
            worst = ", ".join(place(file, points[index].row) for index in ranked.tolist())
            raise ProfileError(
                f"{file}: after the fit {missed}, so the points contradict each other or the law; worst: {worst}"
            )


def check_held_out(held_out: str, relative: NDArray[np.float64], file: Path) -> None:
    """Raises ProfileError where fits without a group of points say nothing of it; `relative` as in `check_fit`."""
    for what, errors in zip(("seconds", "watts"), relative.T, strict=True):
        if missed := _missed(what, errors, HELD_OUT_MEDIAN, HELD_OUT_P90):
            raise ProfileError(
                f"{file}: with {held_out} left out of the fit in turn, {missed} of what was left out, so the points "
                f"contradict each other, or are too far apart to tell what lies between them. Measure more of them, "
                f"and look whether {what} belong to their rows"
            )


def percent(share: float, digits: int = 1) -> str:
    """Absurd figures in few digits."""
    return "more than 1,000%" if share > 10 else f"{share:.{digits}%}"


def _missed(what: str, errors: NDArray[np.float64], median: float, p90: float) -> str | None:
    for share, quantile, allowed in (("half", 0.5, median), ("a tenth", 0.9, p90)):
        if (found := float(np.quantile(np.abs(errors), quantile))) > allowed:
            off = percent(found, 0) if found > 10 else f"{percent(found, 0)} or more"
            return f"{share} of the {what} are off by {off} (allowed: {allowed:.0%})"
    return None
