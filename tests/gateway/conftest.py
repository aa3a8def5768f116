"""A GPU of the fake NVML under load, and a keeper of it in another process."""

import os
import subprocess
import sys
import time

import pytest

from tools.nvml.machine import a100
from tools.testbed.private import private_folder


@pytest.fixture
def machine(make_gpus_here):
    made = make_gpus_here(*a100(1, switch_ms=(0, 0)))
    made.gpus[0].work(0.5, 3600.0)
    return made


@pytest.fixture
def keeper_folder():
    with private_folder("keeper-") as made:
        yield made


@pytest.fixture
def keeper(machine, keeper_folder):
    """The socket of a keeper in another process."""
    socket = keeper_folder / "keeper.sock"
    command = [sys.executable, "-m", "throttllem.keeper", "--gpu", f"{machine.gpus[0].uuid}=210-1410"]
    process = subprocess.Popen(
        [*command, "--socket", str(socket), "--state", str(keeper_folder), "--user", str(os.getuid())]
    )
    end_s = time.monotonic() + 20
    while not socket.exists():
        assert process.poll() is None and time.monotonic() < end_s
        time.sleep(0.01)
    yield socket
    process.terminate()
    assert process.wait(timeout=10) == 0
