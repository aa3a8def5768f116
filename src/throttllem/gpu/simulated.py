"""A GPU that is only a clock, a switch latency and an energy counter. Knows nothing of who works on it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from throttllem.gpu.device import ClockError, Reading, Work, nothing


class SimulatedGpu:
    """`clocks_mhz` are those that can be set; it begins at the highest. `watts(clock_mhz, work)` is the power of all
    GPUs of the engine while that work runs, `idle_w` while nothing does. `now` counts the seconds of switching.
    """

    def __init__(
        self,
        clocks_mhz: Sequence[int],
        *,
        switch_latency_s: float,
        watts: Callable[[int, Work], float],
        idle_w: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clocks_mhz = tuple(sorted(clocks_mhz))
        self._latency_s = switch_latency_s
        self._power = watts
        self._idle_w = idle_w
        self._now = now
        self._clock_mhz = self.clocks_mhz[-1]
        self._watts = idle_w
        self._energy_j = 0.0
        self._turn = 0
        self._switching: deque[tuple[int, float, int]] = deque()

    async def set_clock(self, mhz: int | None, sent: Callable[[], None] = nothing) -> int | None:
        """Ask for a clock (None: the highest, as nobody's, without waiting), wait for the switch, return the clock in
        force then. A switch once asked for happens, even if the wait is cancelled, and of several the last asked for
        stays. Raises ClockError.
        """
        free, mhz = mhz is None, self.clocks_mhz[-1] if mhz is None else mhz
        if mhz not in self.clocks_mhz:
            nearest = min(self.clocks_mhz, key=lambda clock: abs(clock - mhz))
            low, high = self.clocks_mhz[0], self.clocks_mhz[-1]
            raise ClockError(f"{mhz} MHz: this GPU has no such clock; the nearest of {low} to {high} is {nearest}")
        self._turn += 1
        turn = self._turn
        self._switching.append((turn, self._now() + self._latency_s, mhz))
        sent()
        await asyncio.sleep(0 if free else self._latency_s)
        # The sleep may end a clock tick before `now` says so; those who waited have waited enough.
        while not free and self._switching and self._switching[0][0] <= turn:
            self._clock_mhz = self._switching.popleft()[2]
        return self._in_force()

    def read(self) -> Reading:
        """The clock in force, the power of the last work or of idling, the energy counter."""
        return Reading(clock_mhz=self._in_force(), watts=self._watts, energy_j=self._energy_j)

    def worked(self, work: Work) -> None:
        """Count the joules of one iteration: its own where it has them, else by the clock in force."""
        if work.joules is None:
            self._watts = self._power(self._in_force(), work)
            self._energy_j += self._watts * work.seconds
            return
        self._energy_j += work.joules
        if work.seconds > 0:
            self._watts = work.joules / work.seconds

    def idled(self, seconds: float) -> None:
        """Count the joules of doing nothing."""
        self._watts = self._idle_w
        self._energy_j += self._idle_w * seconds

    def _in_force(self) -> int:
        now_s = self._now()
        while self._switching and self._switching[0][1] <= now_s:
            self._clock_mhz = self._switching.popleft()[2]
        return self._clock_mhz
