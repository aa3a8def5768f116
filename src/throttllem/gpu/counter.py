"""One rising count of joules out of counters that stand still for 100 ms, start anew with the driver, or are not there.

Between two refreshes of the counter its watts go on; the next refresh corrects what was guessed, never backwards.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_AHEAD_S = 0.25
"""So long watts may stand in for a counter that does not move. NVML refreshes it every 100 ms or so."""


@dataclass(slots=True)
class EnergyCounter:
    """Joules of one GPU since the first sample."""

    _counted_j: float = 0.0
    _raw_j: float | None = None
    _moved_s: float | None = None
    _watts: float = 0.0
    _told_j: float = 0.0

    def sample(self, at_s: float, watts: float, raw_j: float | None) -> None:
        """A reading, later than the one before; `raw_j` None: there is no counter, and watts are integrated."""
        if raw_j is None:
            if self._moved_s is not None:
                self._counted_j += 0.5 * (self._watts + watts) * (at_s - self._moved_s)
            self._moved_s = at_s
        elif self._raw_j is None or raw_j != self._raw_j:
            if self._raw_j is not None and raw_j > self._raw_j:
                self._counted_j += raw_j - self._raw_j
            elif self._raw_j is not None:  # the driver was loaded anew: its count begins at 0
                self._counted_j = max(self._counted_j, self._told_j)
            self._raw_j, self._moved_s = raw_j, at_s
        self._watts = watts

    def joules(self, now_s: float) -> float:
        """Up to now; it never falls."""
        if self._moved_s is not None:
            ahead_s = min(max(0.0, now_s - self._moved_s), MOST_AHEAD_S)
            self._told_j = max(self._told_j, self._counted_j + self._watts * ahead_s)
        return self._told_j
