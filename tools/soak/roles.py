"""What the fork server of the soak makes: the real keeper, `throttllem serve`, an engine, another user's process.

Faults that must come from inside are put around what the product calls, in these processes only: it has no hooks.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy.ma
import numpy.random
import uvloop

import throttllem.gateway.run
from throttllem.cli.app import main as throttllem_command
from throttllem.gpu import hardware
from throttllem.gpu.hardware import HardwareGpu
from tools.soak import keeper_process, other_user
from tools.testbed.engines import openai_engine
from tools.testbed.fork_server import Order, Roles

RETRY_S = 0.12
"""In place of the second for which gateways wait after a failed set: a schedule lasts no longer."""
CHILD_LIVES_S = 15.0
STEP_S, FIRST_S = 0.006, 0.002
_USED_LATER = (numpy.ma, numpy.random, throttllem.gateway.run)
"""Imported here, or every gateway would import them again."""


# ---- the gateway ---------------------------------------------------------------------------------------------


def gateway(order: Order) -> None:
    """`throttllem` with these "arguments" until SIGTERM; clocks are set far more often than by any policy."""
    assert hasattr(hardware, "RETRY_S")
    vars(hardware)["RETRY_S"] = RETRY_S
    storm = ClockStorm(order)
    storm.install()
    threading.Thread(target=_obey, args=(order["control"], storm), daemon=True).start()
    sys.argv = ["throttllem", *order["arguments"]]
    throttllem_command()


class ClockStorm:
    """Another clock every few hundredths of a second, for as long as the gateway holds the GPUs."""

    def __init__(self, order: Order) -> None:
        self._clocks, self._every_s = order["clocks_mhz"], order["every_s"]
        self._draw = random.Random(order["seed"])
        self._gpu: HardwareGpu | None = None
        self._storm: asyncio.Task[None] | None = None
        self._setting: set[asyncio.Task[int | None]] = set()
        self.loop: asyncio.AbstractEventLoop | None = None

    def install(self) -> None:
        """It begins when the GPUs have been found, and ends before they are restored."""
        enter, leave = HardwareGpu.__aenter__, HardwareGpu.__aexit__

        async def entered(gpu: HardwareGpu) -> HardwareGpu:
            await enter(gpu)
            self._gpu, self.loop = gpu, asyncio.get_running_loop()
            self._storm = self.loop.create_task(self._run())
            return gpu

        async def left(gpu: HardwareGpu, *error: Any) -> None:
            tasks = [*self._setting, *([self._storm] if self._storm else [])]
            self._gpu = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await leave(gpu, *error)

        HardwareGpu.__aenter__, HardwareGpu.__aexit__ = entered, left  # type: ignore[method-assign, assignment]

    def set(self, mhz: int) -> None:
        """One command, not waited for."""
        if self._gpu is not None:
            task = asyncio.get_running_loop().create_task(self._gpu.set_clock(mhz))
            self._setting.add(task)
            task.add_done_callback(self._set)

    def _set(self, task: asyncio.Task[int | None]) -> None:
        self._setting.discard(task)
        if not task.cancelled() and not isinstance(task.exception(), OSError | None):
            task.result()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._draw.uniform(*self._every_s))
            self.set(self._draw.choice(self._clocks))


def _obey(control: socket.socket, storm: ClockStorm) -> None:
    """Carry out the orders of the soak, line by line, in the gateway's event loop."""
    for line in control.makefile("rb"):
        order, loop = json.loads(line), storm.loop
        if loop is None:
            continue
        match order["do"]:
            case "block":
                loop.call_soon_threadsafe(time.sleep, order["for_s"])
            case "child":
                loop.call_soon_threadsafe(_make_child, control)
            case "flood":
                for mhz in order["mhz"]:
                    loop.call_soon_threadsafe(storm.set, mhz)


def _make_child(control: socket.socket) -> None:
    """A child that has everything open that this process has, and outlives it."""
    pid = os.fork()
    if pid == 0:
        time.sleep(CHILD_LIVES_S)
        os._exit(0)
    control.sendall(json.dumps({"child": pid}).encode() + b"\n")


# ---- the others ----------------------------------------------------------------------------------------------


def engine(order: Order) -> None:
    """A small engine on a "port", as fast as the clock of the fake "gpus" lets it be."""
    pace = openai_engine.Pace(openai_engine.FakeGpus(Path(order["library"]), order["gpus"]))
    pace.set({"step_s": STEP_S, "first_s": FIRST_S, "together": True})
    uvloop.run(openai_engine.serve(order["port"], pace))


ROLES: Roles = {"keeper": keeper_process.run, "gateway": gateway, "engine": engine, "other user": other_user.run}
