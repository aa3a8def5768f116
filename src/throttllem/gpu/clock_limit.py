"""Detects that GPUs do not run at the clock that was set, and finds the reason.

Samples and times go in, the limit is read from `limit`. Knows nothing of how clocks are set.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from throttllem.gpu.nvml import Sample, ThrottleReason

log = logging.getLogger("throttllem.gpu")

NEAR_MHZ = 15
"""A clock step of the GPUs that we know: a GPU may run at the neighbour of the clock that was set, or report it."""
SWITCH_S = 0.3
"""A clock that is elsewhere for longer is not just switching."""
OTHER_CONTROLLER = "another controller sets these clocks"
NOT_REACHED = "the GPU reaches no more and reports no reason (the end of its boost, or a lock of another program)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The GPUs run at `mhz` and not at the clock that was set, for this reason."""

    mhz: int
    reason: str


def follows(sample: Sample, mhz: int) -> bool:
    """Whether a GPU runs at the clock that was set, or below it because it is idle."""
    return near(sample, mhz) or (sample.clock_mhz < mhz and sample.throttle == ThrottleReason.IDLE)


def near(sample: Sample, mhz: int) -> bool:
    """Whether a GPU runs at that clock."""
    return abs(sample.clock_mhz - mhz) <= NEAR_MHZ


class LimitDetector:
    """A clock may be elsewhere for four reasons: it is still switching, the GPU throttles (power, heat; NVML reports
    why), another program has set it, or the GPU's boost ends below it. The first one passes within `SWITCH_S`. NVML
    does not report locks, so the third one is concluded where it reports no reason and the clock was at its target
    before, or is above a lock. A lower clock that never was at its target is no sign of another program.
    """

    def __init__(self) -> None:
        self.limit: Limit | None = None
        self._elsewhere_since_s: float | None = None
        self._reached = False
        """Whether all of them were at the clock that was set last."""

    def was_set(self, mhz: int) -> None:
        """Another clock was set: its switch starts now, and a limit above it limits nothing any more."""
        self._elsewhere_since_s, self._reached = None, False
        if self.limit is not None and mhz < self.limit.mhz:
            self.limit = None

    def clear(self) -> None:
        """The clock was restored: nothing is expected of it."""
        self.limit = None

    def update(
        self,
        samples: Sequence[Sample],
        target_mhz: int,
        now_s: float,
        *,
        locked: bool = True,
        set_s: float,
        switched: bool = False,
    ) -> None:
        """Compare the last reading with the clock `target_mhz` that was set at `set_s`. `locked` False (a dry run): the
        GPUs are free, and may be faster than it. `switched`: the time for the switch has passed.
        """
        elsewhere = [sample for sample in samples if not follows(sample, target_mhz)]
        if not locked:
            elsewhere = [sample for sample in elsewhere if sample.clock_mhz < target_mhz]
        if not elsewhere:
            self._reached |= locked and all(near(sample, target_mhz) for sample in samples)
            if self.limit is not None:
                log.warning("clocks follow again: %d MHz", target_mhz)
            self.limit = self._elsewhere_since_s = None
            return

        if self._elsewhere_since_s is None:
            self._elsewhere_since_s = now_s
        if not switched and now_s - max(self._elsewhere_since_s, set_s) <= SWITCH_S:
            return

        slowest = min(elsewhere, key=lambda sample: sample.clock_mhz)
        throttle = slowest.throttle & ~ThrottleReason.IDLE
        taken = locked and (self._reached or slowest.clock_mhz > target_mhz)
        reason = throttle.text if throttle else OTHER_CONTROLLER if taken else NOT_REACHED
        if self.limit is None or self.limit.reason != reason:
            log.warning("clocks do not follow: %d MHz instead of %d MHz: %s", slowest.clock_mhz, target_mhz, reason)
        self.limit = Limit(mhz=slowest.clock_mhz, reason=reason)
