"""The fake NVML in the test's process, and a keeper on its event loop."""

import asyncio
import contextlib

import pytest

from throttllem.gpu.nvml import Nvml
from throttllem.keeper.__main__ import keep
from throttllem.keeper.options import parse_options
from tools.nvml.machine import a100
from tools.testbed.private import private_folder


@pytest.fixture
def machine(make_gpus_here, request):
    """Two A100, each under some load, that switch at once or within the milliseconds that a test asks for."""
    switch_ms = getattr(request, "param", 0.0)
    made = make_gpus_here(*a100(2, switch_ms=(switch_ms, switch_ms)))
    for gpu in made.gpus:
        gpu.work(0.5, 3600.0)
    return made


class Testbed:
    """Two GPUs, and a keeper that can be started."""

    def __init__(self, machine, folder):
        self.machine, self.folder = machine, folder
        self.socket = folder / "keeper.sock"

    @contextlib.asynccontextmanager
    async def keeper(self, *more, gpus=None, clocks="210-1410"):
        """Runs while the context is open, then stops as after SIGTERM."""
        allowed = [gpu.uuid for gpu in self.machine.gpus] if gpus is None else gpus
        named = [part for uuid in allowed for part in ("--gpu", f"{uuid}={clocks}")]
        options = parse_options([*named, "--socket", str(self.socket), "--state", str(self.folder), *more])
        stop = asyncio.Event()
        with Nvml() as nvml:
            running = asyncio.create_task(keep(options, nvml, "boot", stop))
            while not self.socket.exists():
                await asyncio.sleep(0.002)
                assert not running.done(), running.exception()
            try:
                yield
            finally:
                stop.set()
                await running
                self.socket.unlink(missing_ok=True)


@pytest.fixture
def testbed(machine):
    with private_folder("gpu-") as folder:
        yield Testbed(machine, folder)
