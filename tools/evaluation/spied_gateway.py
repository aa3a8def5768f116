"""`throttllem` in this process, with a window on its inside: `python -m tools.evaluation.spied_gateway SOCKET serve`.

Whoever connects to the Unix socket SOCKET and sends a byte is told, as JSON, what is open in the gateway just then
("c": after a garbage collection). `--stuck-clock` gives every GPU a clock that cannot be set, `--fast N` an engine N
times as fast, of which one request in 25 fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from throttllem.cli.app import main as throttllem
from throttllem.engines.base import Call, EngineError, Reply
from throttllem.engines.simulated.engine import SimulatedEngine
from throttllem.engines.simulated.realtime import RealtimeEngine
from throttllem.gateway.control.loop import ControlLoop
from throttllem.gateway.http.app import Gateway
from throttllem.gpu.simulated import SimulatedGpu


def main() -> None:
    """Serve until the command line ends."""
    asked = argparse.ArgumentParser(prog="spied_gateway")
    asked.add_argument("socket", type=Path)
    asked.add_argument("--stuck-clock", action="store_true")
    asked.add_argument("--fast", type=float)
    found, rest = asked.parse_known_args()
    if found.stuck_clock:
        SimulatedGpu.set_clock = _stuck  # type: ignore[method-assign]
    if found.fast:
        _hurry(found.fast)
    window = Window()
    window.open(found.socket)
    sys.argv = ["throttllem", *rest]
    throttllem()


class Window:
    """Looks into the gateway from its own loop, between two of its steps: no other thread may hold what it works on."""

    def __init__(self) -> None:
        self.drivers: list[ControlLoop] = []
        self.gateways: list[Gateway] = []
        self.loop: asyncio.AbstractEventLoop | None = None

    def open(self, path: Path) -> None:
        """Get to know what starts in this process, and answer on the socket."""
        start, watch = ControlLoop.start, Gateway.watch

        async def started(loop: ControlLoop) -> None:
            self.drivers.append(loop)
            self.loop = asyncio.get_running_loop()
            await start(loop)

        async def watching(gateway: Gateway) -> None:
            self.gateways.append(gateway)
            await watch(gateway)

        ControlLoop.start = started  # type: ignore[method-assign, assignment]
        Gateway.watch = watching  # type: ignore[method-assign, assignment]
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen()
        threading.Thread(target=self._answer, args=(listening,), daemon=True).start()

    def _answer(self, listening: socket.socket) -> None:
        while True:
            asker, _ = listening.accept()
            with asker, contextlib.suppress(OSError):
                assert self.loop is not None
                collect = asker.recv(1) == b"c"
                found = asyncio.run_coroutine_threadsafe(self.inside(collect), self.loop).result(10)
                asker.sendall(json.dumps(found).encode())

    async def inside(self, collect: bool) -> dict[str, Any]:
        """Counts of what is open, and this process' own; `collect`: of what is not garbage only."""
        if collect:
            gc.collect()
        snapshots = [loop.controller.snapshot() for loop in self.drivers]
        views = [view for snapshot in snapshots for view in snapshot.engines]
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        return {
            "visits": sum(len(loop.open()) for loop in self.drivers),
            "queue": sum(snapshot.queue for snapshot in snapshots),
            "rows": sum(view.running + view.pending for view in views),
            "in flight": sum(backend.in_flight for loop in self.drivers for backend in loop.backends),
            "exchanges": sum(len(gateway._open) for gateway in self.gateways),
            "tasks": len(tasks),
            "names": dict(Counter(_name(task) for task in tasks)),
            "objects": len(gc.get_objects()),
        }


def _name(task: asyncio.Task[Any]) -> str:
    return str(getattr(task.get_coro(), "__qualname__", "?"))


async def _stuck(self: SimulatedGpu, mhz: int | None, sent: Callable[[], None] | None = None) -> int | None:
    raise OSError(f"{mhz} MHz: the clock is stuck (injected)")


def _hurry(times: float) -> None:
    """An engine so much faster than its GPU, some of whose requests fail."""
    whole, numbers = RealtimeEngine.open, itertools.count()
    step = SimulatedEngine.step

    @contextlib.asynccontextmanager
    async def failing(self: RealtimeEngine, call: Call) -> AsyncIterator[Reply]:
        number = next(numbers)
        if number % 50 == 25:
            raise EngineError("this request fails (injected)")
        async with whole(self, call) as reply:
            if number % 50 == 49:
                yield Reply(status=reply.status, headers=reply.headers, read=_cut_off(reply))
            else:
                yield reply

    def hurried(self: SimulatedEngine) -> Any:
        begun = step(self)
        return None if begun is None else (begun[0], begun[1] / times, begun[2])

    RealtimeEngine.open = failing  # type: ignore[method-assign]
    SimulatedEngine.step = hurried  # type: ignore[method-assign]


def _cut_off(reply: Reply) -> Callable[[], Awaitable[bytes]]:
    """`reply.read` that fails at its second call."""
    calls = itertools.count()

    async def read() -> bytes:
        if next(calls):
            raise EngineError("this answer breaks off (injected)")
        return await reply.read()

    return read


if __name__ == "__main__":
    main()
