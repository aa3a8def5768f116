"""A clock that stands still: a hint at a lock, and no more than a hint. Nothing is restored by it."""

from __future__ import annotations

import time
from collections.abc import Callable

from throttllem.gpu.nvml import Brake, NvmlGpu

_LOOKS, _MOST_LOOKS, _LOOK_S = 4, 20, 0.03
_EXPLAINS = Brake.APPLICATION_CLOCKS | Brake.POWER_CAP | Brake.HARDWARE | Brake.SYNC_BOOST | Brake.THERMAL
_EXPLAINS |= Brake.HARDWARE_THERMAL | Brake.POWER_BRAKE | Brake.DISPLAY


def steady_mhz(gpu: NvmlGpu, sleep: Callable[[float], None] = time.sleep) -> int | None:
    """The clock, if it stands still strictly between the lowest and the highest with no reason that NVML reports; else
    None. Takes about 0.1 s. Raises NvmlError.

    NVML does not report locked clocks. Such a clock may be a lock, of a range the end in force; it may as well be the
    boost clock of a busy GPU, which many cards hold below their highest. A clock that moves may still be switching, and
    is waited for.
    """
    ends, still, mhz = gpu.clocks_mhz(), 0, 0
    for look in range(_MOST_LOOKS):
        if look:
            sleep(_LOOK_S)
        sample = gpu.sample()
        if sample.brake & _EXPLAINS:
            return None
        still, mhz = (still + 1 if sample.clock_mhz == mhz else 1), sample.clock_mhz
        if still == _LOOKS:
            return None if mhz in (ends[0], ends[-1]) else mhz
    return None
