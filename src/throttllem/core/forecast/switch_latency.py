"""How long a switch of clocks takes, from the command to the clock read back: learned while it serves, by clock band.

It begins with what the profile measured, where that measured any. Bounded and deterministic. Knows nothing of how a
clock is set, nor of SLOs.
"""

# How long depends most on the clock that is switched to, and is a property of the board and its driver: 4.5 ms at the
# median and a dozen at most on an A800 (arXiv 2502.20075), 200 ms in the paper. A plan that must be in time rests on
# it, so what counts is not the mean but a time that few switches exceed. Of n switches that are alike the next one is
# within the k-th smallest with probability k / (n + 1), whatever their distribution (as in conformal prediction), so
# the estimate is the smallest such that k / (n + 1) is `_WITHIN` at least. Fewer than `FEWEST` switches can show none;
# until then the estimate is what was configured, or the longest that was seen, if that is longer.
#
# A profile records for each clock how many switches it measured and what few of them exceeded. Each counts as a switch
# that took so long: none of them took much longer, and the live ones push them out of the recent ones.

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FEWEST = 20
"""Switches in a band before its estimate may be below what was configured."""
_WITHIN = 0.95
"""Probability that the next switch takes no longer than the estimate."""
_RECENT = 64
_BANDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledSwitches:
    """Switches to one clock as a profile recorded them: `count` of them, of which `within_s` seconds is what few exceed
    (see `within`).
    """

    mhz: int
    count: int
    within_s: float


def within(seconds: Iterable[float]) -> float:
    """The latency that the next switch does not exceed with probability `_WITHIN`, from these measured seconds; of too
    few of them the longest.
    """
    ascending = sorted(seconds)
    n = len(ascending)
    return ascending[min(math.ceil(_WITHIN * (n + 1)), n) - 1]


@dataclass(slots=True, kw_only=True)
class BandSwitches:
    """Seconds of the last `_RECENT` switches to a clock of one band, of `seen` so far."""

    seen: int = 0
    recent_s: deque[float] = field(default_factory=deque)
    within_s: float = 0.0
    """What few of the recent ones exceed."""

    def took(self, seconds: float) -> None:
        """One more switch."""
        self.seen += 1
        self.recent_s.append(seconds)
        if len(self.recent_s) > _RECENT:
            self.recent_s.popleft()
        self.within_s = within(self.recent_s)

    def expected_s(self, configured_s: float) -> float:
        """The estimate."""
        return max(self.within_s, configured_s) if self.seen < FEWEST else self.within_s


@dataclass(frozen=True, slots=True, kw_only=True)
class BandLatency:
    """One band for telemetry: its clocks, the switches to one of them that were measured, the median of the recent ones
    (None: none was), and what plans assume.
    """

    low_mhz: int
    high_mhz: int
    switches: int
    median_s: float | None
    assumed_s: float


@dataclass(slots=True, kw_only=True)
class SwitchLatency:
    """The switches of one engine, by the band of the target: as many clocks in each of four, as far as that goes.

    `clocks_mhz` ascending are the engine's throughout; `configured_s` is what counts while little is known.
    """

    bands: tuple[BandSwitches, ...] = ()

    @classmethod
    def profiled(cls, clocks_mhz: Sequence[int], switches: Sequence[ProfiledSwitches]) -> SwitchLatency:
        """What a profile of the engine recorded."""
        begun = cls()
        for each in switches:
            for _ in range(min(each.count, _RECENT)):
                begun.took(clocks_mhz, each.mhz, each.within_s)
        return begun

    def took(self, clocks_mhz: Sequence[int], mhz: int, seconds: float) -> None:
        """A switch to `mhz` took so long; one to a clock that is none of the engine's tells nothing."""
        column = bisect_left(clocks_mhz, mhz)
        if column == len(clocks_mhz) or clocks_mhz[column] != mhz:
            return
        if not self.bands:
            self.bands = tuple(BandSwitches() for _ in range(min(_BANDS, len(clocks_mhz))))
        self.bands[_band(column, len(clocks_mhz))].took(seconds)

    def to_s(self, clocks_mhz: Sequence[int], mhz: int, configured_s: float) -> float:
        """Seconds that a switch to that clock is expected to take at most."""
        if not self.bands:
            return configured_s
        column = min(bisect_left(clocks_mhz, mhz), len(clocks_mhz) - 1)
        return self.bands[_band(column, len(clocks_mhz))].expected_s(configured_s)

    def to_each_s(self, clocks_mhz: Sequence[int], configured_s: float) -> Floats:
        """The same for every clock, shape (clocks,)."""
        count = len(clocks_mhz)
        if not self.bands:
            return np.full(count, configured_s)
        expected_s = np.array([band.expected_s(configured_s) for band in self.bands])
        return expected_s[_bands(count)]

    def view(self, clocks_mhz: Sequence[int], configured_s: float) -> tuple[BandLatency, ...]:
        """All bands, for telemetry; () before the first switch was measured."""
        bands, found = _bands(len(clocks_mhz)), []
        for number, band in enumerate(self.bands):
            inside = np.flatnonzero(bands == number)
            found.append(
                BandLatency(
                    low_mhz=clocks_mhz[inside[0]],
                    high_mhz=clocks_mhz[inside[-1]],
                    switches=band.seen,
                    median_s=median(band.recent_s) if band.recent_s else None,
                    assumed_s=band.expected_s(configured_s),
                )
            )
        return tuple(found)


def _band(column: int, clocks: int) -> int:
    return column * min(_BANDS, clocks) // clocks


def _bands(clocks: int) -> npt.NDArray[np.int64]:
    return np.arange(clocks) * min(_BANDS, clocks) // clocks
