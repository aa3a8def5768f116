"""Sets and resets locked clocks. The keeper alone imports this; whoever reads GPUs has no way to it."""

from __future__ import annotations

from dataclasses import dataclass

import pynvml

from throttllem.gpu.nvml import Lock, NvmlError, NvmlGpu, Trouble, seen_lock


class SharedError(NvmlError):
    """Others share the GPU: nothing was asked of it."""


@dataclass(frozen=True, slots=True)
class LockableGpu(NvmlGpu):
    """One GPU whose clock may be locked. Every method raises NvmlError."""

    def before(self, normally: Lock | None) -> Lock | None:
        """The lock that it has now: its normal one, else what shows; not where others share the GPU."""
        self._check()
        return normally or seen_lock(self)

    def lock(self, lock: Lock) -> None:
        """Lock its SM clock; not where others share the GPU."""
        self._check()
        self._ask(f"{lock[0]} to {lock[1]} MHz", pynvml.nvmlDeviceSetGpuLockedClocks, *lock)

    def give_back(self, before: Lock | None) -> None:
        """As it was before: locked to that, or not at all. Whoever shares the GPU now."""
        if before is None:
            self._ask("unlocking", pynvml.nvmlDeviceResetGpuLockedClocks)
        else:
            self._ask(f"{before[0]} to {before[1]} MHz", pynvml.nvmlDeviceSetGpuLockedClocks, *before)

    def _check(self) -> None:
        if (use := self.use()) is not None:
            raise SharedError(f"clock of {self.uuid}: {use.value}", Trouble.UNSUPPORTED)
