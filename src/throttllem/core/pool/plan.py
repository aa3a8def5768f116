"""The engines of a pool that draw least for a rate of requests: how many of each size.

A pure function of the sizes' cost curves. Knows nothing of time, nor of the engines that run now.
"""

# Engines share the rate in proportion to what their size holds, so all are equally far from their limit. Each size has
# a rate at which a request costs least. About as many engines as the rate contains those, of the size with the cheapest
# one, draw least, as convex curves are cheapest shared evenly. Another size only helps with the rest, where whole
# engines do not fit the rate or the GPUs. So every number of engines of one size, with up to two of each other, is
# priced: a thousand GPUs and three sizes are some 20,000 plans.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from throttllem.core.clocks.cost_curve import CostCurve

Floats = npt.NDArray[np.float64]

_MOST_OTHERS = 2
"""Engines of each other size that are tried beside any number of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What engines cost: the curve of each size by tensor parallel degree, and watts of a GPU without an engine."""

    curves: Mapping[int, CostCurve]
    free_w: float

    def holds_rps(self, engines: Mapping[int, int]) -> float:
        """The rate that these engines hold together."""
        return sum(self.curves[tp].holds_rps * count for tp, count in engines.items())

    def watts(self, engines: Mapping[int, int], rate_rps: float, gpus: int) -> float:
        """Mean watts of a pool with these engines at a rate."""
        share = rate_rps / (self.holds_rps(engines) or 1.0)
        drawn_w = sum(
            self.curves[tp].watts_at(share * self.curves[tp].holds_rps) * count for tp, count in engines.items()
        )
        return drawn_w + self.free_w * (gpus - sum(tp * count for tp, count in engines.items()))


def cheapest(
    prices: Prices, rate_rps: float, gpus: int, *, needed_rps: float, least: Mapping[int, int]
) -> dict[int, int]:
    """The engines of least watts at a rate of those that hold `needed_rps`, on `gpus`, with `least` of each size at
    least; if none hold it, those that hold most. Sizes that hold nothing are left out.
    """
    sizes = sorted(tp for tp, curve in prices.curves.items() if curve.holds_rps)
    best = math.inf, math.inf
    found = dict(least)
    for main in sizes:
        others = [tp for tp in {*sizes, *least} if tp != main]
        for more in product(*(range(_MOST_OTHERS + 1 if tp in sizes else 1) for tp in others)):
            fixed = {tp: least.get(tp, 0) + count for tp, count in zip(others, more, strict=True)}
            room = gpus - sum(tp * count for tp, count in fixed.items())
            counts = np.arange(least.get(main, 0), room // main + 1)
            holds_rps: Floats = prices.holds_rps(fixed) + prices.curves[main].holds_rps * counts.astype(np.float64)
            counts, holds_rps = counts[holds_rps > 0.0], holds_rps[holds_rps > 0.0]
            if not counts.size:
                continue
            share = rate_rps / holds_rps
            watts = prices.free_w * (room - main * counts)
            for tp, count in ((main, counts), *((tp, np.array(count)) for tp, count in fixed.items() if count)):
                watts = watts + prices.curves[tp].watts_of(share * prices.curves[tp].holds_rps) * count
            lacks_rps = np.maximum(0.0, needed_rps - holds_rps)
            at = int(np.lexsort((watts, lacks_rps))[0])
            if (lacks_rps[at], watts[at]) < best:
                best = float(lacks_rps[at]), float(watts[at])
                found = {**fixed, main: int(counts[at])}
    return {tp: count for tp, count in sorted(found.items()) if count}
