"""The fake NVML, a keeper and an agent on the test's loop, and the pool's secret as the documentation makes it."""

import asyncio
import contextlib
import subprocess
import threading

import pytest

from tests.gpu.conftest import machine, testbed  # noqa: F401 (fixtures)
from throttllem.agent.remote_gpu import RemoteGpu
from throttllem.agent.secured import HOW, client_context, server_context
from throttllem.agent.server import Agent
from throttllem.gpu.hardware import HardwareGpu, Mode
from throttllem.gpu.setters import clock_setter

CLOCKS_MHZ = (600, 900, 1200, 1410)


def new_secret(folder):
    """A pool's secret, made as the documentation makes it."""
    subprocess.run(HOW, shell=True, cwd=folder, check=True, capture_output=True)
    return folder / "pool.pem"


@pytest.fixture(scope="session")
def secret(tmp_path_factory):
    return new_secret(tmp_path_factory.mktemp("pool"))


@contextlib.asynccontextmanager
async def agent_at(keeper, secret, port=0, kind=HardwareGpu):
    """An agent's port; the agent ends with the block, as after SIGTERM."""
    ports = asyncio.get_running_loop().create_future()

    def gpu(hello):
        setter = clock_setter(keeper=keeper, ttl_s=hello.ttl_s)
        return kind(tuple(hello.gpus), mode=Mode(hello.mode), setter=setter, clocks_mhz=tuple(hello.clocks_mhz))

    agent = Agent(make_gpu=gpu, version="1")
    serving = asyncio.create_task(agent.serve("127.0.0.1", port, server_context(secret), ports.set_result))
    try:
        yield await ports
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert agent.held == {}
        assert not [thread for thread in threading.enumerate() if thread.name == "gpu sampler"], "NVML stays open"


def remote(port, secret, names=("0", "1"), mode=Mode.ON, ttl_s=3.0, clocks_mhz=CLOCKS_MHZ):
    return RemoteGpu(
        names,
        address=f"127.0.0.1:{port}",
        context=client_context(secret),
        mode=mode,
        clocks_mhz=clocks_mhz,
        ttl_s=ttl_s,
        version="1",
        now=asyncio.get_running_loop().time,
    )


async def readable(gpu, within_s=5.0):
    """Its first reading."""
    async with asyncio.timeout(within_s):
        while True:
            with contextlib.suppress(OSError):
                return gpu.read()
            await asyncio.sleep(0.01)


async def unreadable(gpu, within_s=5.0):
    """Why it cannot be read any more."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                gpu.read()
            except OSError as error:
                return str(error)
            await asyncio.sleep(0.01)


async def until(condition, within_s=5.0):
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)
