"""Measurements beside the law of a GPU that resembles theirs, before any fit: another unit, or columns that are none.

What differs from that GPU by a factor is what a fit is for; only what no GPU can be is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.points import Point
from throttllem.profiling.profile import ProfileError, place

Logs = NDArray[np.float64]
"""Logarithms of seconds, of watts: one line per point."""

UNIT_RATIO = 20.0
"""Between an A40 (0.7 TB/s) and a B200 (8 TB/s) lie a factor of 12; milliseconds, kilowatts and per cent lie beyond."""
RISING_SLOPE = 0.05
"""Seconds like clock^0.05 or more: never physical, the law's own slope being between 0 and -1."""
FLAT_PART = 0.2
"""Part of the expected rise of watts with the clock; H100, A100 and A40 differ by a factor of three at most."""
LEAST_RISE = 0.15
"""Watts like clock^0.15: less is expected only where all clocks are low, or at the power limit."""
FLAT_CLOCKS = 1.5
"""Highest clock over lowest from which watts must rise: over less, all clocks may be held back by the power limit."""
WIDE_CLOCKS = 2.0
"""Highest clock over lowest from which watts of any two GPUs go together; over fewer clocks the batch may hide it."""
LEAST_CORRELATION = 0.4
"""Between the watts and those of a GPU like it: 0.79 and more from A40 to H100, about 0 for watts of other rows."""
SHOWN = 5


def check_units(measured: Logs, law: Logs, like: str, file: Path) -> None:
    """Raises ProfileError where half of the seconds or watts are off by more than GPUs differ."""
    for what, does, middle in zip(
        ("seconds", "watts"), ("takes", "draws"), np.median(measured - law, axis=0), strict=True
    ):
        if abs(middle) > math.log(UNIT_RATIO):
            raise ProfileError(
                f"{file}: {what} are {_times(float(middle))} what {like} {does}: another unit? Give seconds, and "
                f"watts of all GPUs of the engine together, or name a nearer GPU with --like"
            )


def check_seconds(points: Sequence[Point], measured: Logs, top: Logs, file: Path) -> None:
    """Raises ProfileError where seconds fall as the clock falls.

    `top`: what the law says of each point's load at the top clock; seconds over it are compared within engine sizes.
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
    """Raises ProfileError where watts follow neither the clock nor the work as a GPU's do.

    `law` is what `like` draws, `top` what it draws under the same load at its top clock.
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
    """None where all points are at one clock."""
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
    """Less each engine size's own mean, which the number of GPUs sets."""
    centred = logs.copy()
    for _, mine in _sizes(points):
        centred[mine] -= logs[mine].mean()
    return centred


def _times(log_ratio: float) -> str:
    """Such as "about 1,000 times" or "about 1/1,000 of", to one figure."""
    if abs(log_ratio) > math.log(1e6):
        return "more than 1,000,000 times" if log_ratio > 0 else "less than 1/1,000,000 of"
    ratio = math.exp(abs(log_ratio))
    rounded = round(ratio, -math.floor(math.log10(ratio)))
    return f"about {rounded:,.0f} times" if log_ratio > 0 else f"about 1/{rounded:,.0f} of"
