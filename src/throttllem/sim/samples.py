"""One quantity in seconds, measured any number of times in one run, in bounded memory.

Exact up to `MOST_VALUES` values; above, counts in buckets of equal ratio. Knows nothing of what is measured.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from throttllem.sim.result import Quantiles

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

MOST_VALUES = 1 << 18
"""Up to so many values of a run are kept as they are; a run of an hour at 70 requests/s has fewer requests."""
_RATIO = 1.005
"""Of neighbouring edges: a percentile from buckets is off by 0.25 % at most."""
_LEAST_S, _MOST_S = 1e-9, 1e6
_EDGES_S: Floats = np.concatenate([[0.0], _LEAST_S * _RATIO ** np.arange(np.log(_MOST_S / _LEAST_S) / np.log(_RATIO))])
_CENTRES_S: Floats = np.concatenate([[0.0], np.sqrt(_EDGES_S[1:-1] * _EDGES_S[2:]), [_MOST_S]])


@dataclass(slots=True)
class Samples:
    """Measured values, each with how often it counts."""

    _values: array[float] = field(default_factory=lambda: array("d"))
    _times: array[int] = field(default_factory=lambda: array("q"))
    _counts: Counts | None = None
    """By bucket, of the values that were folded; None: every value is still in `_values`."""
    _sum_s: float = 0.0

    def add(self, value_s: float, times: int = 1) -> None:
        """Count a value."""
        self._values.append(value_s)
        self._times.append(times)
        if len(self._values) >= MOST_VALUES:
            self._fold()

    def extend(self, values_s: Floats, times: Counts) -> None:
        """Count values, each as many `times`."""
        first = 0
        while first < len(values_s):
            last = first + MOST_VALUES - len(self._values)
            self._values.frombytes(values_s[first:last].tobytes())
            self._times.frombytes(times[first:last].tobytes())
            first = last
            if len(self._values) >= MOST_VALUES:
                self._fold()

    @property
    def exact(self) -> bool:
        """Whether percentiles come from the values themselves."""
        return self._counts is None

    def points(self) -> tuple[Floats, Counts]:
        """Values and how often each counts; of a long run the centres of buckets, ascending."""
        if self._counts is None:
            return np.array(self._values), np.array(self._times)
        self._fold()
        found = np.flatnonzero(self._counts)
        return _CENTRES_S[found], self._counts[found]

    def spread(self, most: int = 20_000) -> list[float]:
        """A sample to draw: the values, or `most` evenly ranked ones of a long run."""
        values, counts = self.points()
        if self.exact:
            return list(values.tolist())
        ranks = (np.arange(most) + 0.5) / most * counts.sum()
        drawn: list[float] = values[np.searchsorted(np.cumsum(counts), ranks)].tolist()
        return drawn

    def quantiles(self) -> Quantiles:
        """Mean (exact) and percentiles (nearest rank)."""
        found = quantiles(*self.points())
        if self._counts is None:
            return found
        return replace(found, mean=self._sum_s / int(self._counts.sum()))

    def _fold(self) -> None:
        values, times = np.array(self._values), np.array(self._times)
        self._sum_s += float(values @ times)
        buckets = np.searchsorted(_EDGES_S, values, side="right") - 1
        counts = np.bincount(buckets, weights=times, minlength=_EDGES_S.size).astype(np.int64)
        self._counts = counts if self._counts is None else self._counts + counts
        self._values, self._times = array("d"), array("q")


def quantiles(values: Floats, weights: Counts | None = None) -> Quantiles:
    """Mean and percentiles (nearest rank), weighted where single values stand for several."""
    if not values.size:
        return Quantiles(mean=None, p50=None, p90=None, p95=None, p99=None)
    order = np.argsort(values, kind="stable")
    ranks = np.cumsum(np.ones(values.size) if weights is None else weights[order])
    p50, p90, p95, p99 = (
        float(values[order[min(int(np.searchsorted(ranks, q * ranks[-1])), values.size - 1)]])
        for q in (0.5, 0.9, 0.95, 0.99)
    )
    return Quantiles(mean=float(np.average(values, weights=weights)), p50=p50, p90=p90, p95=p95, p99=p99)
