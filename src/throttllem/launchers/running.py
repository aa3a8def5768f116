"""The launcher of engines that somebody else starts: they run, or will."""

from __future__ import annotations

from throttllem.launchers.base import NOT_RUN, Ended, EngineCommand, Launched


class RunningLauncher:
    """Starts and stops nothing."""

    async def launch(self, command: EngineCommand) -> Launched:
        """Nothing is started."""
        return Launched(engine_id=command.engine_id)

    async def stop(self, engine_id: str) -> None:
        """The engine goes on."""

    async def listed(self) -> tuple[Launched, ...]:
        """None: whether they run, only a connection shows."""
        return ()

    async def watch(self, engine_id: str) -> Ended:
        """This launcher runs none."""
        return NOT_RUN
