"""One GPU's energy as a count that never falls, out of a counter that NVML refreshes only every 100 ms or so, that
restarts at 0 with the driver, or that the GPU does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_AHEAD_S = 0.25
"""The longest time for which power stands in for a counter that does not move."""


@dataclass(slots=True)
class EnergyCounter:
    """Joules of one GPU since the first sample.

    Between two refreshes the count goes on at the power that was read last; the next refresh corrects it. What was
    reported is never taken back: the count stands still until the counter has caught up.
    """

    _counted_j: float = 0.0
    """Sum of the counter's steps (without a counter: of the integrated power), up to `_moved_s`."""
    _raw_j: float | None = None
    _moved_s: float | None = None
    _watts: float = 0.0
    _reported_j: float = 0.0

    def sample(self, at_s: float, watts: float, raw_j: float | None) -> None:
        """Add a reading, later than the one before. `raw_j`: the counter; None: there is none, power is integrated."""
        if raw_j is None:
            if self._moved_s is not None:
                self._counted_j += 0.5 * (self._watts + watts) * (at_s - self._moved_s)
            self._moved_s = at_s
        elif self._raw_j is None or raw_j != self._raw_j:
            if self._raw_j is not None and raw_j > self._raw_j:
                self._counted_j += raw_j - self._raw_j
            elif self._raw_j is not None:  # the driver was reloaded, and its counter starts at 0 again
                self._counted_j = max(self._counted_j, self._reported_j)
            self._raw_j, self._moved_s = raw_j, at_s
        self._watts = watts

    def joules(self, now_s: float) -> float:
        """The count at `now_s`; it never falls."""
        if self._moved_s is not None:
            ahead_s = min(max(0.0, now_s - self._moved_s), MOST_AHEAD_S)
            self._reported_j = max(self._reported_j, self._counted_j + self._watts * ahead_s)
        return self._reported_j
