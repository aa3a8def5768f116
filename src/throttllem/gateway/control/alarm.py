"""One timer on a time line of its own: it rings once when its time has come, never early."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

_CLOCK_S = 0.001
"""The loop's clock may be so much coarser than ours."""


class LoopTimer:
    """`ring` is called when the time last set has come, by `now`."""

    def __init__(self, ring: Callable[[], None], now: Callable[[], float]) -> None:
        self._ring = ring
        self._now = now
        self._handle: asyncio.TimerHandle | None = None
        self._due_s = math.inf

    def set(self, due_s: float) -> None:
        """Ring at `due_s` instead; infinite: not at all."""
        if due_s == self._due_s and self._handle is not None:
            return
        self.cancel()
        self._due_s = due_s
        if due_s < math.inf:
            self._handle = asyncio.get_running_loop().call_later(max(0.0, due_s - self._now()), self._due)

    def cancel(self) -> None:
        """Do not ring."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _due(self) -> None:
        if self._now() < self._due_s:
            self._handle = asyncio.get_running_loop().call_later(_CLOCK_S, self._due)
            return
        self._handle = None
        self._ring()
