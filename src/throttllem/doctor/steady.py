"""Finds a clock that stands still: a hint that it is locked, and only a hint. Nothing is restored because of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from throttllem.gpu.nvml import NvmlGpu, ThrottleReason

_READINGS, _MOST_READINGS, _PERIOD_S = 4, 20, 0.03
_EXPLAINED = (
    ThrottleReason.APPLICATION_CLOCKS
    | ThrottleReason.POWER_CAP
    | ThrottleReason.HARDWARE
    | ThrottleReason.SYNC_BOOST
    | ThrottleReason.THERMAL
    | ThrottleReason.HARDWARE_THERMAL
    | ThrottleReason.POWER_BRAKE
    | ThrottleReason.DISPLAY
)


def steady_mhz(gpu: NvmlGpu, sleep: Callable[[float], None] = time.sleep) -> int | None:
    """The clock, if it stands still strictly between the lowest and the highest one for no reason that NVML reports;
    else None. Takes about 0.1 s. Raises NvmlError.

    NVML does not report locked clocks. Such a clock may be a lock (of a range, the end that is in force). It may also
    be the boost clock of a busy GPU, which many cards hold below their highest clock. A clock that moves may still be
    switching, so it is read until it stands still, up to a limit.
    """
    clocks, equal_readings, mhz = gpu.clocks_mhz(), 0, 0
    for reading in range(_MOST_READINGS):
        if reading:
            sleep(_PERIOD_S)
        sample = gpu.sample()
        if sample.throttle & _EXPLAINED:
            return None
        equal_readings = equal_readings + 1 if sample.clock_mhz == mhz else 1
        mhz = sample.clock_mhz
        if equal_readings == _READINGS:
            return None if mhz in (clocks[0], clocks[-1]) else mhz
    return None
