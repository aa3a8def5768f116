"""Sets and resets locked clocks. Only the keeper and the doctor import this; code that reads GPUs cannot reach it."""

from __future__ import annotations

from dataclasses import dataclass

import pynvml

from throttllem.gpu.nvml import Lock, NvmlError, NvmlGpu, Trouble


class SharedError(NvmlError):
    """Others share the GPU: nothing was asked of it."""


@dataclass(frozen=True, slots=True)
class LockableGpu(NvmlGpu):
    """One GPU whose clock may be locked. Every method raises NvmlError."""

    def check(self) -> None:
        """Raises SharedError where others share the GPU."""
        if (use := self.use()) is not None:
            raise SharedError(f"clock of {self.uuid}: {use.value}", Trouble.UNSUPPORTED)

    def lock(self, lock: Lock) -> None:
        """Lock its SM clock. Raises SharedError where others share the GPU."""
        self.check()
        self._ask(f"{lock[0]} to {lock[1]} MHz", pynvml.nvmlDeviceSetGpuLockedClocks, *lock)

    def restore(self, baseline: Lock | None) -> None:
        """Lock it to its baseline, or reset its clocks where it has none; also where others share the GPU now."""
        if baseline is None:
            self._ask("unlocking", pynvml.nvmlDeviceResetGpuLockedClocks)
        else:
            self._ask(f"{baseline[0]} to {baseline[1]} MHz", pynvml.nvmlDeviceSetGpuLockedClocks, *baseline)
