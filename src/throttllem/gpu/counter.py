"""One GPU's energy as a count that never falls, out of a counter that NVML refreshes only every 100 ms or so, that
restarts at 0 with the driver, that counts more than the GPU, or that the GPU does not have.
"""

# Two readings, and each may be missing or wrong
#
# The counter is the more exact one, so it is the count. Where there is none, power is integrated. A counter may also
# stand still, or count a whole module (CPU and memory of a GH200): its slope then differs from the watts that are read
# at the same time. Over COMPARED_S of samples the two differ by a few percent at most (NVML's power is a mean over up
# to a second); where they differ by more than ODD, and in the next COMPARED_S again, power is integrated from then on.
# Where there is no power reading, watts are the counter's slope from one refresh to the next.

from __future__ import annotations

from dataclasses import dataclass, field

MOST_AHEAD_S = 0.25
"""The longest time for which power stands in for a counter that does not move."""
COMPARED_S = 5.0
ODD = 0.3
"""Relative."""
STANDS_S = 0.45
"""A counter that does not move for so long stands still: it is refreshed at least every 0.2 s."""
_GAP_S = 0.5
"""Over a longer gap between two samples, integrated power is no measure."""


def odd_counter(times_watts: float) -> str | None:
    """What is wrong with a counter whose slope is so many times the watts that are read; None: nothing."""
    if abs(times_watts - 1) <= ODD:
        return None
    if times_watts < 0.01:
        return "its energy counter stands still"
    covers = " (it covers more than the GPU, as that of a module does)" if times_watts > 1 else ""
    return f"its energy counter grows {times_watts:.2g} times as fast as its watts say{covers}"


@dataclass(slots=True)
class _Comparison:
    """Of counter and integrated power, over COMPARED_S. `owed_j`: by how much less was counted than integrated, in all
    comparisons since the last one that agreed.
    """

    owed_j: float = 0.0
    odd: str | None = None
    _began_s: float | None = None
    _integrated_j: float = 0.0
    _counted_j: float = 0.0

    def twice_odd(self, at_s: float, gap_s: float, integrated_j: float, counted_j: float) -> bool:
        """Add a sample. Whether two comparisons in sequence were odd."""
        if self._began_s is None or gap_s > _GAP_S:
            self._began_s, self._integrated_j, self._counted_j = at_s, 0.0, 0.0
            return False
        self._integrated_j += integrated_j
        self._counted_j += counted_j
        if at_s - self._began_s < COMPARED_S or self._integrated_j <= 0:
            return False
        before, self.odd = self.odd, odd_counter(self._counted_j / self._integrated_j)
        self.owed_j = 0.0 if self.odd is None else self.owed_j + self._integrated_j - self._counted_j
        self._began_s, self._integrated_j, self._counted_j = at_s, 0.0, 0.0
        return before is not None and self.odd is not None


@dataclass(slots=True)
class EnergyCounter:
    """Joules of one GPU since the first sample. `watts`: its power; None: not known yet. `trouble`: why the counter is
    not used although there is one.

    Between two refreshes the count goes on at the power that was read last; the next refresh corrects it. What was
    reported is never taken back: the count stands still until the counter has caught up.
    """

    watts: float | None = None
    trouble: str | None = None
    _counted_j: float = 0.0
    """Sum of the counter's steps (without a counter: of the integrated power), up to `_moved_s`."""
    _raw_j: float | None = None
    _moved_s: float | None = None
    _sampled_s: float | None = None
    _reported_j: float = 0.0
    _compared: _Comparison = field(default_factory=_Comparison)

    def sample(self, at_s: float, watts: float | None, raw_j: float | None) -> None:
        """Add a reading, later than the one before. `raw_j` None: no counter; `watts` None: no power reading."""
        gap_s = 0.0 if self._sampled_s is None else at_s - self._sampled_s
        integrated_j = 0.5 * ((self.watts or 0.0) + (watts or 0.0)) * gap_s
        counted_j = 0.0
        if raw_j is not None and raw_j != self._raw_j:
            counted_j = self._moved(at_s, watts, raw_j)
        if raw_j is None or self.trouble is not None:
            self._counted_j += integrated_j
            self._moved_s = at_s
        elif watts is not None and self._compared.twice_odd(at_s, gap_s, integrated_j, counted_j):
            self.trouble = f"{self._compared.odd}: power is integrated instead"
            self._counted_j, self._moved_s = self._counted_j + self._compared.owed_j, at_s
        if watts is not None:
            self.watts = watts
        self._sampled_s = at_s

    def joules(self, now_s: float) -> float:
        """The count at `now_s`; it never falls."""
        if self._moved_s is not None:
            ahead_s = min(max(0.0, now_s - self._moved_s), MOST_AHEAD_S)
            self._reported_j = max(self._reported_j, self._counted_j + (self.watts or 0.0) * ahead_s)
        return self._reported_j

    def _moved(self, at_s: float, watts: float | None, raw_j: float) -> float:
        """The counter shows another value: its step, 0 if it is the first one or begins at 0 again."""
        before_j, self._raw_j = self._raw_j, raw_j
        step_j = 0.0 if before_j is None else max(0.0, raw_j - before_j)
        if self.trouble is not None:
            return step_j
        if before_j is not None and raw_j < before_j:  # the driver was reloaded
            self._counted_j = max(self._counted_j, self._reported_j)
        self._counted_j += step_j
        if watts is None and step_j and self._moved_s is not None:
            self.watts = step_j / (at_s - self._moved_s)
        self._moved_s = at_s
        return step_j
