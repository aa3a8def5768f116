"""The error of a law against measurements, and against groups of them held out of its fit.

Knows nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.table import Table

P = TypeVar("P")
M = TypeVar("M")


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Absolute relative errors (1 = 100 %) of `count` points."""

    count: int
    mean: float
    median: float
    p90: float
    worst: float

    @classmethod
    def of(cls, relative: ArrayLike) -> Self:
        """Of signed relative errors, any shape. Raises ValueError if there is none or one is not finite."""
        found = np.abs(np.asarray(relative, dtype=float)).ravel()
        if not found.size or not np.isfinite(found).all():
            raise ValueError("errors: at least one, and all of them finite")
        return cls(
            count=found.size,
            mean=float(found.mean()),
            median=float(np.median(found)),
            p90=float(np.quantile(found, 0.9)),
            worst=float(found.max()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Errors at the held-out points; `held_out` names them ("nothing": errors of the fit to all points)."""

    held_out: str
    seconds: Errors
    watts: Errors

    @classmethod
    def of(cls, name: str, relative: NDArray[np.float64]) -> Self:
        """Of signed relative errors of seconds and watts, shape (points, 2)."""
        return cls(held_out=name, seconds=Errors.of(relative[:, 0]), watts=Errors.of(relative[:, 1]))


def errors_table(scores: Sequence[Score], title: str) -> Table:
    """For a terminal."""
    table = Table(title=title)
    table.add_column("held out")
    table.add_column("rows", justify="right")
    for what in ("seconds", "watts"):
        for figure in ("median", "p90", "worst"):
            table.add_column(f"{what}\n{figure}", justify="right")
    for score in scores:
        cells = [percent(value) for e in (score.seconds, score.watts) for value in (e.median, e.p90, e.worst)]
        table.add_row(score.held_out, str(score.seconds.count), *cells)
    return table


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent; an absurd one in few digits."""
    return "more than 1,000%" if share > 10 else f"{share:.{digits}%}"


def held_out(
    points: Sequence[P],
    group: Callable[[P], Hashable],
    fit: Callable[[list[P]], M],
    errors: Callable[[M, list[P]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Leave out each group of points in turn and fit to the others; the signed relative errors, group after group.

    Groups are in the order of their first points.
    """
    found = []
    for left_out in dict.fromkeys(group(point) for point in points):
        fitted = fit([point for point in points if group(point) != left_out])
        found.append(errors(fitted, [point for point in points if group(point) == left_out]))
    return np.concatenate(found)
