"""One engine's process, as its backend sees it: started while it cannot be reached, given a deadline, and started again
after growing pauses where it fails.

Knows nothing of how a process is started (launchers/), nor of requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from throttllem.engines.base import EngineError
from throttllem.launchers.base import Ended, EngineCommand, Launched, Launcher, LaunchError
from throttllem.launchers.running import RunningLauncher

log = logging.getLogger("throttllem.gateway")

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_SOUND_S = 60.0
"""An engine that was up for so long did not fail at its start: the pauses begin from the first again."""


@dataclass(slots=True, eq=False, kw_only=True)
class EngineProcess:
    """`ready_s`: from its start an engine has so long until it answers. `keep_running`: it outlives the gateway.

    `command` is asked for at each start, as it names GPUs that are found when the gateway starts.
    """

    launcher: Launcher
    engine_id: str
    command: Callable[[], EngineCommand]
    ready_s: float
    keep_running: bool
    now: Callable[[], float]
    launched: Launched | None = None
    """The run of it that this gateway started or adopted; None: none, or an engine that it did not start."""
    starts: int = 0
    failures: int = 0
    """Ends that nobody asked for, deadlines that passed, and starts that failed."""
    _in_a_row: int = 0
    _not_before_s: float = 0.0
    _trouble: str = ""
    _since_s: float = 0.0
    """Since when it should become ready."""
    _up_s: float | None = None
    _watching: asyncio.Task[None] | None = None

    @property
    def starts_it(self) -> bool:
        """Whether the engine is started where it does not run."""
        return not isinstance(self.launcher, RunningLauncher)

    @property
    def note(self) -> str | None:
        """What is to be known of it; None: it runs already, or a launcher runs nothing of it now."""
        if self.launched is None:
            return None
        origin = "adopted from an earlier gateway" if self.launched.adopted else "started by the gateway"
        ends = f"; {self.failures} failures of its process so far" if self.failures else ""
        return f"{origin} ({self.launched.incarnation}), output in {self.launched.log}{ends}"

    async def run(self, on_end: Callable[[Ended], None]) -> None:
        """See to it that it runs; `on_end` is called when it has ended by itself.

        Raises EngineError while it may not be started, or is late and was stopped.
        """
        left_s = self._not_before_s - self.now()
        if left_s > 0:
            raise EngineError(f"{self._trouble}; it is started again in {left_s:.0f} s")
        try:
            launched = await self.launcher.launch(self.command())
        except LaunchError as error:
            self._failed(str(error))
            raise EngineError(str(error)) from error
        if launched.incarnation is None:
            self.launched = None
            return
        if self.launched is None or launched.incarnation != self.launched.incarnation:
            self.launched, self._since_s, self._up_s = launched, self.now(), None
            self.starts += not launched.adopted
            self._watching = asyncio.get_running_loop().create_task(self._watch(on_end))
        elif self._up_s is None and self.now() - self._since_s > self.ready_s:
            why = f"it was not ready within {self.ready_s:g} s and was stopped; its output is in {launched.log}"
            await self.stop()
            self._failed(why)
            raise EngineError(why)

    def up(self) -> None:
        """It answers."""
        self._up_s = self.now()

    def down(self) -> None:
        """It answers no more; it has `ready_s` from now on to do so again."""
        self._note_sound()
        self._up_s, self._since_s = None, self.now()

    async def runs(self) -> bool:
        """Whether the launcher runs it already: an earlier gateway started it."""
        try:
            return any(launched.engine_id == self.engine_id for launched in await self.launcher.listed())
        except LaunchError as error:
            log.warning("engine %s: %s", self.engine_id, error)
            return False

    async def stop(self) -> None:
        """End its process, if this gateway or an earlier one started it."""
        await self.let_go()
        try:
            await self.launcher.stop(self.engine_id)
        except LaunchError as error:
            log.error("%s", error)

    async def let_go(self) -> None:
        """Watch it no more; it goes on."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        self.launched = None

    async def _watch(self, on_end: Callable[[Ended], None]) -> None:
        ended = await self.launcher.watch(self.engine_id)
        self._note_sound()
        self.launched, self._watching = None, None
        self._failed(ended.why)
        on_end(ended)

    def _note_sound(self) -> None:
        if self._up_s is not None and self.now() - self._up_s >= _SOUND_S:
            self._in_a_row = 0

    def _failed(self, why: str) -> None:
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**self._in_a_row)
        self.failures += 1
        self._in_a_row += 1
        self._trouble, self._not_before_s = why, self.now() + pause_s
        log.error("engine %s: %s; it is started again after %.0f s", self.engine_id, why, pause_s)
