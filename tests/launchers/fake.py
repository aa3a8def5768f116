"""A launcher without processes: its engines run as long as a test lets them."""

import asyncio

from throttllem.gateway.control.engine_process import EngineProcess
from throttllem.launchers.base import NOT_RUN, Ended, EngineCommand, Launched, LaunchError
from throttllem.launchers.running import RunningLauncher


class FakeLauncher:
    """`on_start` and `on_end` get the engine's id. While `refuses` is a text, a start fails with it."""

    def __init__(self, on_start=lambda engine_id: None, on_end=lambda engine_id: None):
        self.on_start, self.on_end = on_start, on_end
        self.running, self.starts, self.stops, self.refuses = {}, [], [], None

    async def launch(self, command):
        found = self.running.get(command.engine_id)
        if found is not None and found[1] != command.words:
            await self.stop(command.engine_id)
            found = None
        if found is None:
            if self.refuses is not None:
                raise LaunchError(self.refuses)
            self.starts.append(command.engine_id)
            found = (f"run {len(self.starts)}", command.words, asyncio.get_running_loop().create_future())
            self.running[command.engine_id] = found
            self.on_start(command.engine_id)
        return Launched(engine_id=command.engine_id, incarnation=found[0])

    async def stop(self, engine_id):
        if engine_id in self.running:
            self.stops.append(engine_id)
            self.end(engine_id, "it was stopped")

    async def listed(self):
        return tuple(Launched(engine_id=name, incarnation=found[0]) for name, found in self.running.items())

    async def watch(self, engine_id):
        found = self.running.get(engine_id)
        return NOT_RUN if found is None else await asyncio.shield(found[2])

    def end(self, engine_id, why, *, certain=True):
        """An engine ends by itself."""
        self.running.pop(engine_id)[2].set_result(Ended(why=why, certain=certain))
        self.on_end(engine_id)


def command(engine_id="engine-1", words=("serve",), port=1, host="127.0.0.1", gpus=0, **environment):
    return EngineCommand(engine_id=engine_id, words=words, host=host, port=port, gpus=gpus, environment=environment)


def process(now, launcher=None, **more):
    """The process of a toy engine; without a launcher it runs already."""
    some = {"engine_id": "engine-1", "command": command, "ready_s": 30.0, "keep_running": False} | more
    return EngineProcess(launcher=launcher or RunningLauncher(), now=now, **some)
