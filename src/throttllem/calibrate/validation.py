"""Validation of measurements: what cannot be a GPU's is refused with the reason, what is only suspicious is a warning.

Knows nothing of how constants are fitted, nor of how warnings are shown.
"""

# Three kinds of check.
#
# Before the fit, each row alone and all together: enough clocks, batch sizes and rows; clocks, KV caches, seconds and
# watts that the GPU can have; one iteration measured twice with one result.
#
# Before the fit, beside the law of a GPU that resembles the measured one (`--like`). The fit accounts for what differs
# by a factor, so these checks refuse only what no GPU does: another unit (half of the figures off by more than GPUs
# differ), seconds that fall as the clock falls, watts that follow neither the clock nor the work. Trends over the clock
# are taken of the measurement over the law at the top clock under the same load, so that the mix of loads cancels out.
#
# After the fit: the law must follow its own points, and what was held out of it.

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.errors import percent
from throttllem.calibrate.fit import Fitted
from throttllem.calibrate.points import Point, bands, reject_rows
from throttllem.physics.catalogue import Gpu
from throttllem.physics.engine import EnginePhysics, ModelDoesNotFit
from throttllem.physics.load import kv_bytes_per_token
from throttllem.physics.model import Model
from throttllem.profiling.profile import ProfileError, place

Logs = NDArray[np.float64]
"""Logarithms of seconds and of watts: one row per point."""

FEWEST_CLOCKS = 3
"""The clock law bends at a knee: two clocks do not show where."""
FEWEST_BATCHES = 2
"""One batch size does not separate the cost of a request from that of an iteration."""
FEWEST_IN_GROUP = 5
"""The median of five measurements tolerates two bad ones."""
REPEAT_RATIO = 1.4
"""Largest ratio of two measurements of one point: five standard deviations at 5 % scatter of each."""
LIMIT_RATIO = 1.2
"""Largest ratio of watts to the power limit: a governor overshoots briefly, not by more (four times 5 %)."""
SECONDS = (1e-6, 1e4)
"""Of an iteration: less than a kernel's launch, and more than three hours, are errors of the unit."""
MEMORY_RATIO = 1.1
"""Of weights and KV over the whole memory of `like`: makers and drivers count 80 GB as 79.6 to 85.9e9 bytes."""
WORST_MEDIAN, WORST_P90 = 0.25, 0.5
"""A law that is off by this much at half of the points, or at a tenth, describes something else."""
HELD_OUT_MEDIAN, HELD_OUT_P90 = 0.2, 0.4
"""Of clocks or batch sizes left out. Of eight GPUs of the laws' kind, at three clocks and 36 rows with 10 % scatter,
the worst had 10 and 24 %; watts of other rows had 32 and 58 %, seconds of other rows 60 and 233 %."""
SHOWN = 5
"""Rows named in an error."""
_REMEDY = "or name another GPU with --like, or correct its data sheet with --sheet"
UNIT_RATIO = 20.0
"""Between an A40 (0.7 TB/s) and a B200 (8 TB/s) lie a factor of 12; milliseconds, kilowatts and per cent lie beyond."""
RISING_SLOPE = 0.05
"""Seconds like clock^0.05 or more are not physical: the law's own slope is between 0 and -1."""
FLAT_PART = 0.2
"""Fraction of the expected rise of watts with the clock; H100, A100 and A40 differ by a factor of three at most."""
LEAST_RISE = 0.15
"""Watts like clock^0.15: the law rises less only where all clocks are low, or at the power limit."""
FLAT_CLOCKS = 1.5
"""Highest clock over lowest from which watts must rise: over less, the power limit may hold all clocks back."""
WIDE_CLOCKS = 2.0
"""Highest clock over lowest from which watts of any two GPUs correlate; over less, the batch may hide it."""
LEAST_CORRELATION = 0.4
"""Between the watts and those of a GPU like it: 0.79 and more from A40 to H100, about 0 for watts of other rows."""
ODD_SPREADS = 3.0
"""A constant is this far from its prior's middle by chance in one of 370 cases."""
ONE_GPU_RATIO = 1.25
"""Watts times the number of GPUs are within this ratio of the expected watts if they are those of one GPU."""


# ---- before the fit: rows ----------------------------------------------------------------------------------------


def check_enough(points: Sequence[Point], file: Path) -> None:
    """Raise ProfileError for too few clocks, batch sizes, or rows at them."""
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
    """Raise ProfileError for engine sizes, clocks and KV caches that `gpu` cannot have."""
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
    reject_rows(wrong, len(points), file, f"correct it, {_REMEDY}")
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
    reject_rows(wrong, len(points), file, f"correct kv_blocks, block_tokens or prefill_tokens, {_REMEDY}")


def _most_tokens(gpu: Gpu, model: Model, tp: int) -> float:
    return max(0.0, MEMORY_RATIO * gpu.memory_bytes - model.weight_bytes / tp) / kv_bytes_per_token(model, tp)


def check_figures(points: Sequence[Point], gpu: Gpu, file: Path) -> None:
    """Raise ProfileError for seconds and watts that `gpu` cannot have."""
    wrong = [(point.row, why) for point in points if (why := _impossible(point, gpu))]
    reject_rows(wrong, len(points), file, f"correct it, {_REMEDY}")


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
    """Raise ProfileError where several measurements of one point are further apart than scatter allows."""
    repeats: dict[tuple[float, ...], list[Point]] = defaultdict(list)
    for point in points:
        repeats[point.tp, *point.arguments].append(point)
    for same in repeats.values():
        for what in ("seconds", "watts"):
            ranked = sorted(same, key=lambda point: float(getattr(point, what)))
            least, most = (float(getattr(end, what)) for end in (ranked[0], ranked[-1]))
            if most > REPEAT_RATIO * least:
                raise ProfileError(
                    f"{file}: {place(file, ranked[0].row)} and {place(file, ranked[-1].row)} contradict each other: "
                    f"the same iteration measured at {least:g} and {most:g} {what}; scatter explains a factor of "
                    f"{REPEAT_RATIO} at most. Remove the wrong rows"
                )


# ---- before the fit: beside a similar GPU ------------------------------------------------------------------------


def check_units(measured: Logs, law: Logs, like: str, file: Path) -> None:
    """Raise ProfileError where half of the seconds or watts are off by more than GPUs differ."""
    for what, does, middle in zip(
        ("seconds", "watts"), ("takes", "draws"), np.median(measured - law, axis=0), strict=True
    ):
        if abs(middle) > math.log(UNIT_RATIO):
            raise ProfileError(
                f"{file}: {what} are {_times(float(middle))} what {like} {does}: another unit? Give seconds, and "
                f"watts of all GPUs of the engine together, or name a nearer GPU with --like"
            )


def check_seconds(points: Sequence[Point], measured: Logs, top: Logs, file: Path) -> None:
    """Raise ProfileError where seconds fall as the clock falls, at any engine size.

    `top`: the law at the top clock under each point's load.
    """
    for tp, mine in _sizes(points):
        trend = _trend([points[index] for index in mine], (measured - top)[mine, 0])
        if trend and trend.slope > max(RISING_SLOPE, 3 * trend.error):
            rising = np.argsort(-np.maximum(trend.away * trend.beyond, 0.0), kind="stable")[:SHOWN]
            worst = ", ".join(place(file, points[mine[index]].row) for index in rising.tolist())
            raise ProfileError(
                f"{file}: at tp {tp} seconds fall as the clock falls (like clock^{trend.slope:.2f}), which no GPU "
                f"does; worst: {worst}. Are the columns right?"
            )


def check_watts(points: Sequence[Point], measured: Logs, law: Logs, top: Logs, like: str, file: Path) -> None:
    """Raise ProfileError where watts do not follow the clock, or the clock and the work together, as a GPU's do.

    `law`: the watts of `like` at each point; `top`: those under the same load at its top clock.
    """
    for tp, mine in _sizes(points):
        chosen = [points[index] for index in mine]
        found, wanted = (_trend(chosen, (each - top)[mine, 1]) for each in (measured, law))
        if found is None or wanted is None:
            continue
        falls = found.slope < -max(RISING_SLOPE, 3 * found.error)
        wide = _reach(chosen) >= FLAT_CLOCKS and wanted.slope > LEAST_RISE
        flat = wide and found.slope < FLAT_PART * wanted.slope
        if falls or (flat and found.slope + 3 * found.error < wanted.slope):
            raise ProfileError(
                f"{file}: at tp {tp} watts do not rise with the clock at equal work (like clock^{found.slope:.2f}, "
                f"those of {like} like clock^{wanted.slope:.2f}). Were they measured at each clock, and in these rows?"
            )
    expected, drawn = (_centred(points, each[:, 1]) for each in (law, measured))
    if _reach(points) >= WIDE_CLOCKS:
        alike = float(expected @ drawn) / max(float(np.sqrt((expected @ expected) * (drawn @ drawn))), 1e-300)
        if alike < LEAST_CORRELATION:
            raise ProfileError(
                f"{file}: watts do not follow clock and work (correlation with what {like} would draw: {alike:.2f}; "
                f"{LEAST_CORRELATION} is the least). Do they belong to these rows?"
            )


def _reach(points: Sequence[Point]) -> float:
    clocks = [point.clock_mhz for point in points]
    return max(clocks) / min(clocks)


class _Trend(NamedTuple):
    """Slope over the logarithm of the clock with its standard error, and both sides' distance from their means."""

    slope: float
    error: float
    away: NDArray[np.float64]
    beyond: NDArray[np.float64]


def _trend(points: Sequence[Point], logs: NDArray[np.float64]) -> _Trend | None:
    """None if all points are at one clock."""
    clock = np.log([point.clock_mhz for point in points])
    away, beyond = clock - clock.mean(), logs - logs.mean()
    if not (spread := float(away @ away)):
        return None
    slope = float(away @ beyond) / spread
    return _Trend(slope, float(np.std(beyond - slope * away) / np.sqrt(spread)), away, beyond)


def _sizes(points: Sequence[Point]) -> list[tuple[int, list[int]]]:
    """Each engine size, ascending, with the indices of its points."""
    return [
        (tp, [index for index, point in enumerate(points) if point.tp == tp]) for tp in sorted({p.tp for p in points})
    ]


def _centred(points: Sequence[Point], logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Less the mean of each engine size, which depends on the number of GPUs."""
    centred = logs.copy()
    for _, mine in _sizes(points):
        centred[mine] -= logs[mine].mean()
    return centred


def _times(log_ratio: float) -> str:
    """As in "about 1,000 times" or "about 1/1,000 of", to one digit."""
    if abs(log_ratio) > math.log(1e6):
        return "more than 1,000,000 times" if log_ratio > 0 else "less than 1/1,000,000 of"
    ratio = math.exp(abs(log_ratio))
    rounded = round(ratio, -math.floor(math.log10(ratio)))
    return f"about {rounded:,.0f} times" if log_ratio > 0 else f"about 1/{rounded:,.0f} of"


# ---- after the fit ------------------------------------------------------------------------------------------------


def check_fit(points: Sequence[Point], relative: NDArray[np.float64], file: Path) -> None:
    """Raise ProfileError where the fitted law does not follow its own points; `relative` errors: (points, 2)."""
    for what, errors in zip(("seconds", "watts"), relative.T, strict=True):
        if found := _exceeded(what, errors, WORST_MEDIAN, WORST_P90):
            ranked = np.argsort(-np.abs(errors), kind="stable")[:SHOWN]
            worst = ", ".join(place(file, points[index].row) for index in ranked.tolist())
            raise ProfileError(
                f"{file}: after the fit {found}, so the points contradict each other or the law; worst: {worst}"
            )


def check_held_out(held_out: str, relative: NDArray[np.float64], file: Path) -> None:
    """Raise ProfileError where fits without a group of points do not predict it; `relative` as in `check_fit`."""
    for what, errors in zip(("seconds", "watts"), relative.T, strict=True):
        if found := _exceeded(what, errors, HELD_OUT_MEDIAN, HELD_OUT_P90):
            raise ProfileError(
                f"{file}: with {held_out} left out of the fit in turn, {found} of what was left out, so the points "
                f"contradict each other, or are too far apart to interpolate between. Measure more of them, and "
                f"check that the {what} belong to their rows"
            )


def _exceeded(what: str, errors: NDArray[np.float64], median: float, p90: float) -> str | None:
    for share, quantile, allowed in (("half", 0.5, median), ("a tenth", 0.9, p90)):
        if (found := float(np.quantile(np.abs(errors), quantile))) > allowed:
            off = percent(found, 0) if found > 10 else f"{percent(found, 0)} or more"
            return f"{share} of the {what} are off by {off} (allowed: {allowed:.0%})"
    return None


# ---- warnings ----------------------------------------------------------------------------------------------------


def watts_of_one_gpu(points: Sequence[Point], law_w: NDArray[np.float64], like: str) -> Iterator[str]:
    """A warning for each engine size whose watts look like those of one GPU; `law_w`: the watts of `like`."""
    ratio = np.array([point.watts for point in points]) / law_w
    for tp in sorted({point.tp for point in points} - {1}):
        middle = float(np.median([each for each, point in zip(ratio, points, strict=True) if point.tp == tp]))
        if 1 / ONE_GPU_RATIO < middle * tp < ONE_GPU_RATIO:
            yield f"at tp {tp} the watts are {middle:.2f} of what {tp} x {like} draw: watts of one GPU?"


def far_from_prior(fitted: Sequence[Fitted], like: str) -> Iterator[str]:
    """A warning for each constant that the measurements put further from its prior than GPUs differ."""
    for one in fitted:
        spreads = abs(math.log(one.value / one.constant.start)) / one.constant.spread
        if one.determined and spreads > ODD_SPREADS:
            yield (
                f"{one.constant.path} is {one.value:.3g}, and {one.constant.start:.3g} was expected of a GPU like "
                f"{like}: {spreads:.1f} times the usual difference. Are the columns and --like right?"
            )


def fitted_before(like: Gpu, file_name: str) -> Iterator[str]:
    """A warning if the first guess was itself fitted to this profile."""
    if any(law.source.startswith(f"{fitted_to(file_name)},") for law in (like.time_basis, like.power_basis)):
        yield (
            f"{like.name} was itself fitted to {file_name}: the first guesses depend on the rows held out here, so "
            f"held-out errors are too small. Name with --like the GPU that {like.name} was started from"
        )


def fitted_to(file_name: str) -> str:
    """The beginning of the source of a calibrated entry."""
    return f"fitted to {file_name}"
