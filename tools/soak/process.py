"""One process of a schedule: signals that cannot hit another one, its end, lines to and from it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_AS, prlimit
from typing import Any

from tools.testbed.fork_server import Forked

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_BYTES = 1 << 16


class SoakProcess:
    """`on_death` is called once, after `on_line` got every line that the process has sent."""

    def __init__(
        self,
        forked: Forked,
        role: str,
        *,
        on_death: Callable[[SoakProcess], None] = lambda _: None,
        on_line: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.role, self.pid = role, forked.pid
        self._handle, self._control = forked.pidfd, forked.control
        self.began_s = time.monotonic()
        self.ended_s: float | None = None
        self.dead = asyncio.Event()
        self.ended_by_us = False
        self._on_death, self._on_line = on_death, on_line
        self._received = b""
        self._control.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._handle, self._died)
        loop.add_reader(self._control, self._receive)

    @property
    def alive(self) -> bool:
        """As far as is known."""
        return not self.dead.is_set()

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        self.ended_by_us = self.ended_by_us or number in (signal.SIGKILL, signal.SIGTERM)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def send_line(self, **fields: object) -> None:
        """A line; lost if the process does not read."""
        with suppress(OSError):
            self._control.send(json.dumps(fields).encode() + b"\n")

    async def killed(self) -> None:
        """SIGKILL, and it has ended when this returns."""
        self.send(signal.SIGKILL)
        await self.dead.wait()

    def limit_memory(self, more_bytes: int | None) -> None:
        """What it has now and `more_bytes` at most (None: no limit)."""
        with suppress(OSError, ValueError):
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[0])
            limit = RLIM_INFINITY if more_bytes is None else pages * PAGE_BYTES + more_bytes
            prlimit(self.pid, RLIMIT_AS, (limit, RLIM_INFINITY))

    def close(self) -> None:
        """Release what is left of it."""
        loop = asyncio.get_running_loop()
        for handle in (self._handle, self._control):
            loop.remove_reader(handle)
        os.close(self._handle)
        self._control.close()

    def _died(self) -> None:
        if self.dead.is_set():
            return
        asyncio.get_running_loop().remove_reader(self._handle)
        self._receive()
        self.ended_s = time.monotonic()
        self.dead.set()
        self._on_death(self)

    def _receive(self) -> None:
        while True:
            try:
                data = self._control.recv(_BYTES)
            except (BlockingIOError, ConnectionError):
                break
            if not data:
                asyncio.get_running_loop().remove_reader(self._control)
                break
            *lines, self._received = (self._received + data).split(b"\n")
            for line in lines:
                self._on_line(json.loads(line))
