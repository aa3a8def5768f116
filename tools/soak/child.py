"""One process of a schedule, as the lane holds it: signals that cannot hit another one, its end, lines to and fro."""

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

from tools.soak.zygote import Told, Zygote

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_BYTES = 1 << 16


class Child:
    """`on_death` is called once, after everything that the process has said was heard by `on_word`."""

    def __init__(
        self,
        zygote: Zygote,
        told: Told,
        *,
        on_death: Callable[[Child], None] = lambda _: None,
        on_word: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.role = str(told["role"])
        self.pid, self._handle, self._control = zygote.fork(told)
        self.began_s = time.monotonic()
        self.ended_s: float | None = None
        self.dead = asyncio.Event()
        self.told = False
        """We ended it, one way or the other."""
        self._on_death, self._on_word = on_death, on_word
        self._heard = b""
        self._control.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._handle, self._died)
        loop.add_reader(self._control, self._hear)

    @property
    def alive(self) -> bool:
        """As far as is known."""
        return not self.dead.is_set()

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        self.told = self.told or number in (signal.SIGKILL, signal.SIGTERM)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def say(self, **what: object) -> None:
        """A line; into the void if it does not listen."""
        with suppress(OSError):
            self._control.send(json.dumps(what).encode() + b"\n")

    async def killed(self) -> None:
        """SIGKILL, and it is over when this returns."""
        self.send(signal.SIGKILL)
        await self.dead.wait()

    def limit_memory(self, more_bytes: int | None) -> None:
        """No more than it has now and so many bytes (None: no limit)."""
        with suppress(OSError, ValueError):
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[0])
            limit = RLIM_INFINITY if more_bytes is None else pages * PAGE_BYTES + more_bytes
            prlimit(self.pid, RLIMIT_AS, (limit, RLIM_INFINITY))

    def close(self) -> None:
        """Let go of what is left of it."""
        loop = asyncio.get_running_loop()
        for handle in (self._handle, self._control):
            loop.remove_reader(handle)
        os.close(self._handle)
        self._control.close()

    def _died(self) -> None:
        if self.dead.is_set():
            return
        asyncio.get_running_loop().remove_reader(self._handle)
        self._hear()
        self.ended_s = time.monotonic()
        self.dead.set()
        self._on_death(self)

    def _hear(self) -> None:
        while True:
            try:
                came = self._control.recv(_BYTES)
            except (BlockingIOError, ConnectionError):
                break
            if not came:
                asyncio.get_running_loop().remove_reader(self._control)
                break
            *lines, self._heard = (self._heard + came).split(b"\n")
            for line in lines:
                self._on_word(json.loads(line))
