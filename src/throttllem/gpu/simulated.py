"""A simulated GPU: a clock, the latency of switching it, and an energy counter. Knows nothing of what runs on it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from throttllem.gpu.device import ClockError, Reading, Work


class SimulatedGpu:
    """`clocks_mhz`: those that can be set; it starts at the highest. `watts(clock_mhz, work)`: the power of all GPUs of
    the engine during that work; `idle_w`: without work. `now`: the clock (in seconds) that switches are timed by.
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
        self._switches = 0
        self._switching: deque[tuple[int, float, int]] = deque()
        """Switches under way, oldest first: number, time at which it is in force, clock."""

    async def set_clock(self, mhz: int | None, sent: Callable[[], None] | None = None) -> int | None:
        """Switch to a clock and return the one in force after the switch latency. None: the highest clock, as of a GPU
        that is not set; this does not wait. A switch happens even if its wait is cancelled, and of several at once
        the last one stays. Raises ClockError.
        """
        wait = mhz is not None
        mhz = self.clocks_mhz[-1] if mhz is None else mhz
        if mhz not in self.clocks_mhz:
            nearest = min(self.clocks_mhz, key=lambda clock: abs(clock - mhz))
            low, high = self.clocks_mhz[0], self.clocks_mhz[-1]
            raise ClockError(f"{mhz} MHz: this GPU has no such clock; the nearest of {low} to {high} is {nearest}")
        self._switches += 1
        switch = self._switches
        self._switching.append((switch, self._now() + self._latency_s, mhz))
        if sent is not None:
            sent()
        await asyncio.sleep(self._latency_s if wait else 0)
        # The sleep may end a tick before `now` has reached the end of the switch; the caller has waited long enough.
        while wait and self._switching and self._switching[0][0] <= switch:
            self._clock_mhz = self._switching.popleft()[2]
        return self._in_force()

    def read(self) -> Reading:
        """The clock in force, the power of the last work or of idling, the energy counter."""
        return Reading(clock_mhz=self._in_force(), watts=self._watts, energy_j=self._energy_j)

    def worked(self, work: Work) -> None:
        """Add the energy of one iteration: the engine's own figure where it has one, else power at the clock in force
        times duration.
        """
        if work.joules is None:
            self._watts = self._power(self._in_force(), work)
            self._energy_j += self._watts * work.seconds
            return
        self._energy_j += work.joules
        if work.seconds > 0:
            self._watts = work.joules / work.seconds

    def idled(self, seconds: float) -> None:
        """Add the energy of idling."""
        self._watts = self._idle_w
        self._energy_j += self._idle_w * seconds

    def _in_force(self) -> int:
        now_s = self._now()
        while self._switching and self._switching[0][1] <= now_s:
            self._clock_mhz = self._switching.popleft()[2]
        return self._clock_mhz
