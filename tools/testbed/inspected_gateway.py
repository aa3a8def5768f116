"""A gateway whose inside can be counted: a process of `throttllem serve` with a window, and what it must not keep.

The window knows nothing of the gateway's structure: it counts living objects by class, unfinished tasks and file
descriptors, so that whatever a request leaves behind is found. `python -m tools.testbed.inspected_gateway SOCKET serve
...` answers each byte sent to the Unix socket SOCKET with one JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.testbed.client import Answer, Client
from tools.testbed.gateway import gateway
from tools.testbed.processes import Process

PACKAGE = "throttllem."
GROWS = ("Sample", "Group", "SloCounts")
"""Endings of classes whose objects stay on purpose, up to a bound: the dashboard's samples, learned lengths, counts."""
SLACK = {"tasks": 0, "descriptors": 3}
"""Looking at the engine twice a second keeps up to four connections to it from being idle for long."""
LAST = 1
"""The variable of a loop keeps the last object that went through it."""
OPEN = ("throttllem_queue_requests", "throttllem_running_requests", "throttllem_pending_requests")
"""Samples that are 0 while no request is open."""
SETTLE_S, QUIET_S = 20.0, 2.5
_SAMPLE = re.compile(r"(?m)^(throttllem_\w+)(?:\{[^\n]*\})? (\S+)$")


# ---- inside the process --------------------------------------------------------------------------------------


def census() -> dict[str, Any]:
    """Objects of the package by class, unfinished tasks by name, and the number of all objects, without garbage."""
    gc.collect()
    objects = gc.get_objects()
    # Compiled extensions have types whose `__module__` is no text.
    classes = Counter(kind.__qualname__ for kind in map(type, objects) if str(kind.__module__).startswith(PACKAGE))
    tasks = [one for one in objects if isinstance(one, asyncio.Task) and not one.done()]
    names = Counter(str(getattr(task.get_coro(), "__qualname__", "?")) for task in tasks)
    return {"classes": classes, "tasks": len(tasks), "names": names, "objects": len(objects)}


def _answer(listening: socket.socket) -> None:
    while True:
        asker, _ = listening.accept()
        with asker, contextlib.suppress(OSError):
            asker.recv(1)
            asker.sendall(json.dumps(census()).encode())


def main() -> None:
    """Open the window, then run the rest of the command line."""
    from throttllem.cli.app import main as throttllem  # noqa: PLC0415 - callers of this module need no gateway

    path, sys.argv = sys.argv[1], ["throttllem", *sys.argv[2:]]
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    threading.Thread(target=_answer, args=(listening,), daemon=True).start()
    throttllem()


# ---- outside -------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Inspected:
    """One gateway process with a client of it. `before` is what it held when it was quiet."""

    url: str
    process: Process
    folder: Path
    client: Client
    before: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> str:
        """Its whole log."""
        return self.process.log.read_text(errors="replace")

    async def inside(self) -> dict[str, Any]:
        """What it holds now: its census, file descriptors and resident bytes."""
        reader, writer = await asyncio.open_unix_connection(str(self.folder / "window"))
        writer.write(b"?")
        found: dict[str, Any] = json.loads(await reader.read())
        writer.close()
        proc = Path(f"/proc/{self.process.pid}")
        found["descriptors"] = len(list((proc / "fd").iterdir()))
        found["resident_bytes"] = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return found

    async def metrics(self) -> Mapping[str, float]:
        """Its samples, added up over their labels."""
        status, page = await self.client.get("/metrics")
        assert status == 200, f"/metrics answers {status}"
        totals: Counter[str] = Counter()
        for name, value in _SAMPLE.findall(page):
            totals[name] += float(value)  # type: ignore[assignment]
        return totals

    async def runs(self, count: int) -> bool:
        """Whether at least `count` requests are in engines."""
        metrics = await self.metrics()
        return metrics["throttllem_running_requests"] + metrics["throttllem_pending_requests"] >= count

    async def queued(self, count: int) -> bool:
        """Whether at least `count` requests wait."""
        return (await self.metrics())["throttllem_queue_requests"] >= count

    async def ready(self, within_s: float = 60.0) -> None:
        """Wait until an engine is up, serve a request, and note what a quiet gateway holds."""
        await eventually(self.is_up, within_s, "an engine is up")
        await self.fresh()
        await asyncio.sleep(QUIET_S)  # idle connections to the engine are closed after a while
        self.before = await self.inside()

    async def is_up(self) -> bool:
        """Whether its health check succeeds."""
        with contextlib.suppress(OSError):
            return (await self.client.get("/health"))[0] == 200
        return False

    async def fresh(self) -> Answer:
        """A new request must be served."""
        answer = await self.client.ask(tokens=5)
        assert answer.served, f"a fresh request: {answer.outcome} {answer.body[-300:]!r}"
        return answer

    async def left(self, engine_running: Callable[[], Any] | None = None) -> str:
        """What is left behind, in words. Raises AssertionError if it is anything."""
        await self.fresh()
        began_s, held = time.monotonic(), dict[str, object]()
        while time.monotonic() - began_s < SETTLE_S:
            samples = await self.metrics()
            held = self._held(await self.inside()) | {name: samples[name] for name in OPEN if samples[name]}
            if engine_running is not None and (running := await engine_running()):
                held["running in the engine"] = running
            if not held:
                return "nothing; a fresh request is served"
            await asyncio.sleep(0.25)
        raise AssertionError(f"left behind after {SETTLE_S:.0f} s: {held}")

    def _held(self, found: Mapping[str, Any]) -> dict[str, object]:
        """What there is more of than when it was quiet, and tasks that are gone."""
        if not self.before:
            return {}
        held: dict[str, object] = {
            name: f"{found[name]} > {self.before[name]}"
            for name, slack in SLACK.items()
            if found[name] > self.before[name] + slack
        }
        classes = self.before["classes"]
        held |= {
            name: f"{count} > {classes.get(name, 0)}"
            for name, count in found["classes"].items()
            if count > classes.get(name, 0) + LAST and not name.endswith(GROWS)
        }
        held |= {f"task ended: {name}": 1 for name in set(self.before["names"]) - set(found["names"])}
        return held

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the gateway a signal."""
        self.process.handle.send_signal(number)

    async def ended(self, within_s: float) -> int:
        """Wait for its end; its exit code."""
        return await asyncio.to_thread(self.process.handle.wait, within_s)

    async def stopped(self, within_s: float, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; its exit code."""
        self.kill(number)
        return await self.ended(within_s)


@contextlib.asynccontextmanager
async def inspected_gateway(
    folder: Path,
    *arguments: str,
    model: str,
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Inspected]:
    """`throttllem serve ARGUMENTS`, ready once it listens. `model` is what its client asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "window").unlink(missing_ok=True)
    command = (sys.executable, "-m", "tools.testbed.inspected_gateway", folder / "window", "serve")
    manager = gateway(arguments, folder, command=command, environment=environment, port=port, ready=("/metrics", b""))
    up = await asyncio.to_thread(manager.__enter__)
    try:
        async with Client(up.url, model) as client:
            yield Inspected(url=up.url, process=up.process, folder=folder, client=client)
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


async def eventually(holds: Callable[[], Any], within_s: float, what: str) -> None:
    """Wait until it holds. Raises AssertionError if it does not in time."""
    began_s = time.monotonic()
    while True:
        found = holds()
        if (await found) if asyncio.iscoroutine(found) else found:
            return
        assert time.monotonic() - began_s < within_s, f"not within {within_s:.0f} s: {what}"
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    main()
