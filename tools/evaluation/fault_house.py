"""A real gateway process under faults: started, asked, looked into, and found empty afterwards or not.

The engine behind it is anybody's: `House.engine_running` says how its own count is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.engines.vllm_server import end, free_port
from tools.evaluation.fault_client import Answer, Client
from tools.evaluation.section import ROOT

EMPTY = ("visits", "queue", "rows", "booked", "metered", "exchanges")
"""What must be 0 when nobody asks anything."""
SLACK = {"tasks": 0, "fds": 3}
"""Looking at the engine twice a second keeps up to four connections to it from being idle for long."""
SETTLE_S = 20.0
_SAMPLE = re.compile(r"(?m)^(throttllem_\w+)(?:\{[^\n]*\})? (\S+)$")


@dataclass(slots=True, kw_only=True)
class House:
    """One gateway process. `before` is what it held when it was quiet."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    client: Client
    before: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> str:
        """All that it said."""
        return (self.folder / "gateway.log").read_text(errors="replace")

    async def inside(self, *, collect: bool = False) -> dict[str, Any]:
        """What is open in it now, with its file descriptors and memory. `collect`: its garbage first."""
        reader, writer = await asyncio.open_unix_connection(str(self.folder / "window"))
        writer.write(b"c" if collect else b"-")
        found: dict[str, Any] = json.loads(await reader.read())
        writer.close()
        proc = Path(f"/proc/{self.process.pid}")
        found["fds"] = len(list((proc / "fd").iterdir()))
        found["rss"] = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return found

    async def metrics(self) -> dict[str, float]:
        """Its samples, added up over their labels."""
        status, page = await self.client.get("/metrics")
        assert status == 200, f"/metrics answers {status}"
        totals: dict[str, float] = {}
        for name, value in _SAMPLE.findall(page):
            totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    async def ready(self, within_s: float = 60.0) -> None:
        """Wait until an engine is up, serve a request, and note what a quiet gateway holds."""
        await eventually(self.is_up, within_s, "an engine is up")
        await self.fresh()
        await asyncio.sleep(2.5)  # connections kept for a while to the engine are let go of
        self.before = await self.inside()

    async def is_up(self) -> bool:
        """Whether it says so itself."""
        with contextlib.suppress(OSError):
            return (await self.client.get("/health"))[0] == 200
        return False

    async def fresh(self) -> Answer:
        """A new request must be served."""
        answer = await self.client.ask(tokens=5)
        assert answer.served, f"a fresh request: {answer.said} {answer.body[-300:]!r}"
        return answer

    async def left(self, engine_running: Callable[[], Any] | None = None) -> str:
        """What is left behind, in words. Raises AssertionError if it is anything."""
        await self.fresh()
        began, trouble = time.monotonic(), "?"
        while time.monotonic() - began < SETTLE_S:
            found = await self.inside()
            held = {name: found[name] for name in EMPTY if found[name]}
            if engine_running is not None and (running := await engine_running()):
                held["engine running"] = running
            more = [name for name, slack in SLACK.items() if self.before and found[name] > self.before[name] + slack]
            held |= {name: f"{found[name]} > {self.before[name]}" for name in more}
            gone = set(self.before.get("names", ())) - set(found["names"])
            held |= {f"died: {name}": 1 for name in gone}
            if not held:
                return "nothing; a fresh request is served"
            trouble = f"{held} {found['names']}"
            await asyncio.sleep(0.25)
        raise AssertionError(f"left behind after {SETTLE_S:.0f} s: {trouble}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def ended(self, within_s: float) -> int:
        """Its exit code."""
        return await asyncio.to_thread(self.process.wait, within_s)


@contextlib.asynccontextmanager
async def gateway(
    folder: Path,
    *settings: str,
    model: str,
    engine: str | None = None,
    port: int | None = None,
    flags: Sequence[str] = (),
) -> AsyncIterator[House]:
    """A gateway process in front of `engine` (None: simulated), ended for certain. `flags` are the window's own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "window").unlink(missing_ok=True)
    port = port or free_port()
    command = [sys.executable, "-m", "tools.evaluation.spied_gateway", str(folder / "window"), *flags, "serve"]
    command += ["--port", str(port), *(["--engine", engine] if engine else [])]
    for setting in (f"state_dir={folder / 'state'}", *settings):
        command += ["--set", setting]
    with (folder / "gateway.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
    try:
        async with Client(f"http://127.0.0.1:{port}", model) as client:
            house = House(process=process, url=client.url, folder=folder, client=client)
            await eventually(lambda: _listens(house), 60.0, "the gateway listens")
            yield house
    finally:
        await asyncio.to_thread(end, process)


async def _listens(house: House) -> bool:
    if house.process.poll() is not None:
        raise AssertionError(f"the gateway ended: {house.log[-2000:]}")
    with contextlib.suppress(OSError):
        await house.client.get("/health")
        return True
    return False


async def eventually(holds: Callable[[], Any], within_s: float, what: str) -> None:
    """Wait until it holds. Raises AssertionError if it never does."""
    began = time.monotonic()
    while True:
        found = holds()
        if (await found) if asyncio.iscoroutine(found) else found:
            return
        assert time.monotonic() - began < within_s, f"not within {within_s:.0f} s: {what}"
        await asyncio.sleep(0.05)
