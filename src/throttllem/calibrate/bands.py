"""Neighbouring values of one quantity put together, so that no group of measurements is too small to hold out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def bands(values: Sequence[int], most: int, fewest: int = 1) -> dict[int, int]:
    """Distinct values to bands 0, 1 ... of neighbours: at most `most` bands, each of `fewest` measurements or more.

    Where there are no more than `most` distinct values, and each was measured often enough, each is its own band.
    """
    counts = Counter(values)
    wanted = [chunk.tolist() for chunk in np.array_split(sorted(counts), min(most, len(counts)))]
    joined: list[list[int]] = []
    open_band: list[int] = []
    for chunk in wanted:
        open_band += chunk
        if sum(counts[value] for value in open_band) >= fewest:
            joined.append(open_band)
            open_band = []
    if open_band:
        joined = [*joined[:-1], [*joined[-1], *open_band]] if joined else [open_band]
    return {value: band for band, members in enumerate(joined) for value in members}
