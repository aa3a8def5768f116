"""How far the saving of a run may be chance: an interval from the scatter between stretches of the run."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from throttllem.sim.result import RunResult

_STRETCHES = (8, 20)
"""Fewest and most parts into which a run is cut for its interval."""
_STUDENT = {8: 2.36, 9: 2.31, 10: 2.26, 11: 2.23, 12: 2.20, 13: 2.18, 14: 2.16, 15: 2.14, 16: 2.13, 17: 2.12, 18: 2.11}
"""97.5 % quantile of Student's t by the number of parts (one degree of freedom less); 2.09 for more."""


def saving_interval(run: RunResult, baseline: RunResult) -> tuple[float, int] | None:
    """Half the width of the 95 % interval of `saved`, from the scatter between stretches of the two runs, and how many
    stretches there are. None: the runs are too short, or have too little energy.

    Delete-one jackknife of the ratio of energies over stretches of equal time. A stretch must last twice the median E2E
    latency, so that few requests lie in two.
    """
    both = (run.series.power_w, baseline.series.power_w)
    bins = max(map(len, both))
    if bins < 2 or run is baseline or not run.series.time_s:
        return None
    bin_s = (run.series.time_s[1] - run.series.time_s[0]) if len(run.series.time_s) > 1 else 0.0
    least_s = 2.0 * max(run.e2e_s.p50 or 0.0, baseline.e2e_s.p50 or 0.0, bin_s)
    fewest, most = _STRETCHES
    count = min(most, int(bins * bin_s / least_s)) if least_s else 0
    if count < fewest:
        return None
    joules = np.array([_parts(values, bins, count) for values in both])
    left = joules.sum(axis=1, keepdims=True) - joules
    if not np.isfinite(left).all() or (left <= 0).any():
        return None
    ratio = left[0] / left[1]
    deviation = sqrt((count - 1) / count * float(((ratio - ratio.mean()) ** 2).sum()))
    return _STUDENT.get(count, 2.09) * deviation, count


def _parts(values: Sequence[float], bins: int, count: int) -> list[float]:
    """Sums over `count` stretches of about equal length; a run that ended earlier has 0 at its end."""
    padded = np.zeros(bins)
    padded[: len(values)] = values
    return [float(part.sum()) for part in np.array_split(padded, count)]
