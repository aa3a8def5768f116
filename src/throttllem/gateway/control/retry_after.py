"""How fast requests end, and with that when one that is turned away may well find a place. Knows no clock."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

_UNKNOWN_S = 5
_LONGEST_S = 60


@dataclass(slots=True)
class RetryEstimator:
    """The ends of the last requests."""

    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def ended(self, now_s: float) -> None:
        """A request ended with its whole answer."""
        self._ends.append(now_s)

    def retry_after_s(self, waiting: int, now_s: float) -> int:
        """Seconds until `waiting` requests and one more have found a place, at the pace of the last minute."""
        recent = [at_s for at_s in self._ends if now_s - at_s < _LONGEST_S]
        if not recent:
            return _UNKNOWN_S
        pace = len(recent) / max(1.0, now_s - recent[0])
        return max(1, min(_LONGEST_S, math.ceil((waiting + 1) / pace)))
