"""The clock of one engine's GPUs as the core wants it: set beside whatever else goes on, and told as it is.

The core hears what came of each command, and when somebody or something else has changed the clock. Knows nothing of
the engine but the core's id for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from throttllem.core.types import ClockRead, Event, FrequencyPlan
from throttllem.gpu.device import Gpu, Reading, nothing

log = logging.getLogger("throttllem.gateway")

_RETRY_S = 1.0


@dataclass(slots=True, kw_only=True)
class EngineClock:
    """`reading` is the meter's. `on_command` is called with the seconds from an event to the clock command that came of
    it, as that is on its way. `mode`: "on", "dry-run", "off" of real GPUs, or "simulated".
    """

    name: str
    gpu: Gpu
    reading: Callable[[], Reading]
    now: Callable[[], float]
    mode: str = "simulated"
    on_command: Callable[[float], None] = lambda _: None
    trouble: str | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _key: int | None = None
    _tell: Callable[[Event], None] | None = None
    _wanted_mhz: int | None = None
    _fails: bool = False
    _setting: int = 0
    _told: tuple[int | None, int | None] | None = None

    def begin(self, key: int, tell: Callable[[Event], None], mhz: int | None) -> None:
        """The core knows the engine from now on, at this clock."""
        self._key, self._tell = key, tell
        self._told_core(mhz)

    def end(self) -> None:
        """The core does not know it any more, and what it asked for last is not wanted."""
        self._key = self._wanted_mhz = None

    def set(self, plan: FrequencyPlan, since_s: float) -> None:
        """Set it; the core hears what came of it. `since_s`: when the event came that the plan is of."""
        self._wanted_mhz = plan.mhz
        self._beside(self._set(plan.mhz, since_s))

    def look(self) -> None:
        """Tell the core if the clock is not what it heard last."""
        if self._key is None or self._setting or (self._told and self._told[0] is None and self._fails):
            return  # or it is being set, or tried again since it could not be
        reading = self.reading()
        if self._told != (reading.planned_on_mhz, reading.limit_mhz):
            self._told_core(reading.planned_on_mhz)

    def free(self) -> None:
        """Nothing runs on these GPUs now: their clock is nobody's."""
        self._beside(self.give_back())

    async def give_back(self) -> None:
        """The same, waited for."""
        try:
            await self.gpu.set_clock(None)
        except OSError as error:
            log.error("engine %s: its clocks were not given back: %s", self.name, error)

    async def in_force(self, mhz: int, sent: Callable[[], None] = nothing) -> int | None:
        """Set a clock; the one in force then, None if it is not known."""
        try:
            read, trouble = await self.gpu.set_clock(mhz, sent), "it cannot be read"
        except OSError as error:
            read, trouble = None, str(error)
        except Exception as error:
            log.exception("engine %s: %d MHz was not set", self.name, mhz)
            read, trouble = None, repr(error)
        said = None if read is not None else f"clock: {trouble}"
        if said is not None and said != self.trouble:
            log.error("engine %s: %d MHz was not set: %s", self.name, mhz, trouble)
        self.trouble, self._fails = said, read is None
        return read

    async def _set(self, mhz: int, since_s: float) -> None:
        sent = nothing if self._fails else lambda: self.on_command(self.now() - since_s)
        if self._fails:  # the core asks again at once
            await asyncio.sleep(_RETRY_S)
            if mhz != self._wanted_mhz:
                return
        self._setting += 1
        try:
            read = await self.in_force(mhz, sent)
        finally:
            self._setting -= 1
        if mhz == self._wanted_mhz:  # else the answer to the next one counts
            self._fails = read is None or (read != mhz and self.reading().limit_mhz is None)
            self._told_core(read)

    def _told_core(self, mhz: int | None) -> None:
        limit_mhz = self.reading().limit_mhz
        self._told = mhz, limit_mhz
        if self._key is not None and self._tell is not None:
            self._tell(ClockRead(engine=self._key, mhz=mhz, limit_mhz=limit_mhz))

    def _beside(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
