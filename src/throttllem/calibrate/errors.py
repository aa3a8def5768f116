"""The error of a law against measurements, and against groups of them held out of its fit.

Knows nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
