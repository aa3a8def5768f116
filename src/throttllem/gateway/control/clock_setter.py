"""Sets the clock of one engine's GPUs as the core commands, in the background, and reports the clock in force.

The core gets a `ClockRead` for each command, and one when the clock changed for another reason. Knows nothing of the
engine but the core's key for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from throttllem.core.types import ClockRead, Event, FrequencyPlan
from throttllem.gpu.device import Gpu, Reading, Switch

log = logging.getLogger("throttllem.gateway")

_RETRY_S = 1.0


@dataclass(slots=True, kw_only=True)
class ClockSetter:
    """`reading` is the accounting's. `on_command` is called with the seconds from the event that a clock command
    follows from until the command is sent. `mode`: "on", "dry-run", "off" of real GPUs, or "simulated". `follows`: the
    engine runs on `gpu` (a real engine does not run on a simulated one).
    """

    name: str
    gpu: Gpu
    reading: Callable[[], Reading]
    now: Callable[[], float]
    mode: str = "simulated"
    follows: bool = True
    on_command: Callable[[float], None] = lambda _: None
    trouble: str | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _key: int | None = None
    _emit: Callable[[Event], None] | None = None
    _wanted_mhz: int | None = None
    _fails: bool = False
    _setting: int = 0
    _reported: tuple[int | None, int | None] | None = None
    _switch: Switch | None = None
    """The last one that was reported."""

    def begin(self, key: int, emit: Callable[[Event], None], mhz: int | None) -> None:
        """The core knows the engine from now on, at this clock."""
        self._key, self._emit = key, emit
        self._report(mhz)

    def end(self) -> None:
        """The core does not know the engine any more; its last command is void."""
        self._key = self._wanted_mhz = None

    def set(self, plan: FrequencyPlan, since_s: float) -> None:
        """Set it in the background; a ClockRead follows. `since_s`: when the event came that the plan follows from."""
        self._wanted_mhz = plan.mhz
        self._in_background(self._set(plan.mhz, since_s))

    def look(self) -> None:
        """Emit a ClockRead if the clock is not the one reported last."""
        if self._key is None or self._setting or (self._reported and self._reported[0] is None and self._fails):
            return  # it is being set, or will be tried again
        reading = self.reading()
        if self._reported != (reading.planned_on_mhz, reading.limit_mhz):
            self._report(reading.planned_on_mhz)

    def free(self) -> None:
        """Restore the clocks in the background: nothing runs on these GPUs, or the core's state is in doubt. The last
        command is void.
        """
        self._wanted_mhz = None
        self._in_background(self.restore())

    async def restore(self) -> None:
        """Restore the clocks that the GPUs had before."""
        try:
            await self.gpu.set_clock(None)
        except OSError as error:
            log.error("engine %s: its clocks were not restored: %s", self.name, error)

    async def in_force(self, mhz: int, sent: Callable[[], None] | None = None) -> int | None:
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
        sent = None if self._fails else lambda: self.on_command(self.now() - since_s)
        if self._fails:  # the core commands it again at once
            await asyncio.sleep(_RETRY_S)
            if mhz != self._wanted_mhz:
                return
        self._setting += 1
        try:
            read = await self.in_force(mhz, sent)
        finally:
            self._setting -= 1
        if mhz == self._wanted_mhz:  # else the next command's result counts
            self._fails = read is None or (read != mhz and self.reading().limit_mhz is None)
            self._report(read)

    def _report(self, mhz: int | None) -> None:
        reading = self.reading()
        self._reported = mhz, reading.limit_mhz
        followed = self.follows and reading.dry_run_mhz is None and reading.stands_for_mhz is None
        if self._key is not None and self._emit is not None:
            switch, before = reading.switch, self._switch
            self._switch = switch
            measured_s = None if switch is None or switch is before or switch.mhz != mhz else switch.seconds
            read = ClockRead(
                engine=self._key, mhz=mhz, limit_mhz=reading.limit_mhz, followed=followed, switch_s=measured_s
            )
            self._emit(read)

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
