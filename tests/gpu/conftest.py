"""The fake NVML in this very process, and a keeper on the loop of the test."""

import asyncio
import contextlib
import ctypes
import os

import pytest

from throttllem.gpu.nvml import Nvml
from throttllem.keeper.__main__ import keep, parsed
from tools.nvml import build
from tools.nvml.machine import Machine, a100


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = build.library((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "libnvidia-ml")
    ctypes.CDLL(str(folder / "libnvidia-ml.so.1"))  # found by its name from here on
    return folder


@pytest.fixture
def machine(library, tmp_path, monkeypatch):
    """Two A100 that switch at once, each at some load."""
    with Machine.create(tmp_path / "gpus", a100(2, switch_ms=(0, 0)), library=library) as made:
        monkeypatch.setenv("FAKE_NVML_STATE", str(tmp_path / "gpus"))
        for gpu in made.gpus:
            gpu.root_only(os.geteuid() == 0)
            gpu.work(0.5, 3600.0)
        yield made


class House:
    """Where a keeper lives, and how it is started."""

    def __init__(self, machine, folder):
        self.machine, self.folder = machine, folder
        self.socket = folder / "keeper.sock"

    @contextlib.asynccontextmanager
    async def keeper(self, *more, gpus=None, clocks="210-1410"):
        """One that runs while the block does, then stops as after SIGTERM."""
        allowed = [gpu.uuid for gpu in self.machine.gpus] if gpus is None else gpus
        named = [part for uuid in allowed for part in ("--gpu", f"{uuid}={clocks}")]
        told = parsed([*named, "--socket", str(self.socket), "--state", str(self.folder), *more])
        stop = asyncio.Event()
        with Nvml() as nvml:
            running = asyncio.create_task(keep(told, nvml, "boot", stop))
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
def house(machine, tmp_path):
    return House(machine, tmp_path)
