"""Locks and resets GPU clocks, for the keeper and the doctor. Besides them only zeusd can set clocks."""

from __future__ import annotations

from dataclasses import dataclass

import pynvml

from throttllem.gpu.clock_range import ClockRange
from throttllem.gpu.nvml import NvmlError, NvmlGpu, Trouble


class SharedError(NvmlError):
    """Other clients share the GPU; nothing was set."""


@dataclass(frozen=True, slots=True)
class LockableGpu(NvmlGpu):
    """One GPU whose clock may be locked. Every method raises NvmlError."""

    def check(self) -> None:
        """Raises SharedError where other clients share the GPU."""
        if (sharing := self.sharing()) is not None:
            raise SharedError(f"clock of {self.uuid}: {sharing.value}", Trouble.UNSUPPORTED)

    def lock(self, clocks: ClockRange) -> None:
        """Lock its SM clock to a range. Raises SharedError where other clients share the GPU."""
        self.check()
        self._lock(clocks)

    def restore(self, baseline: ClockRange | None) -> None:
        """Lock it to its baseline, or reset its clocks if it has none; also where other clients share it now."""
        if baseline is None:
            self._call("unlocking", pynvml.nvmlDeviceResetGpuLockedClocks)
        else:
            self._lock(baseline)

    def _lock(self, clocks: ClockRange) -> None:
        self._call(str(clocks), pynvml.nvmlDeviceSetGpuLockedClocks, clocks.low_mhz, clocks.high_mhz)
