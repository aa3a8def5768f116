"""What every fault is tried on: a real vLLM on one port, gateways in front of it, and the row of the table it ends in.

A fault is a coroutine `fault(bench) -> [Found]`; it raises AssertionError where a promise is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from throttllem.engines.capacity import total
from tools.engines.vllm_server import FLAGS, MODEL, Server, ServerError, free_port, vllm_server
from tools.evaluation.fault_house import House, gateway

DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One row: what was done, what the clients saw, what was left behind."""

    fault: str
    client: str
    left: str


Fault = Callable[["Bench"], Coroutine[Any, Any, list[Found]]]


@dataclass(slots=True, kw_only=True)
class Bench:
    """One engine's address, behind which a vLLM comes and goes."""

    environment: Path
    model: Path
    folder: Path
    say: Callable[[str], None]
    port: int = field(default_factory=free_port)
    flags: tuple[str, ...] = ()
    server: Server | None = None
    _manager: AbstractContextManager[Server] | None = None
    _count: int = 0

    @property
    def url(self) -> str:
        """Where the engine is, or will be."""
        return f"http://127.0.0.1:{self.port}"

    async def engine(self, *flags: str) -> None:
        """Have a vLLM with these flags (after the usual ones) up; the one that is, if it has them."""
        if self.server is not None and self.flags == flags and await self.answers():
            return
        await self.stop()
        try:
            await self._start(flags)
        except ServerError as error:
            self.say(f"{error}\nonce more")
            await self._start(flags)

    async def _start(self, flags: tuple[str, ...]) -> None:
        self._count += 1
        manager = vllm_server(
            self.environment,
            self.model,
            self.folder / f"vllm-{self._count}.log",
            flags=(*FLAGS, *flags),
            environment=DEVELOPMENT,
            port=self.port,
            say=self.say,
        )
        self.server, self.flags, self._manager = await asyncio.to_thread(manager.__enter__), flags, manager

    async def stop(self) -> None:
        """End the vLLM, whatever state it is in."""
        manager, self._manager, self.server = self._manager, None, None
        if manager is not None:
            await asyncio.to_thread(manager.__exit__, None, None, None)

    async def answers(self) -> bool:
        """Whether anything well is behind the address."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            return (await self.ask("GET", "/health"))[0] == 200
        return False

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Speak to the engine directly."""
        limit = aiohttp.ClientTimeout(total=60)
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.request(method, self.url + path, json=body) as got,
        ):
            return got.status, await got.read()

    async def running(self) -> int:
        """Requests in the engine, in its own words."""
        _, page = await self.ask("GET", "/metrics")
        return int((total(page, "vllm:num_requests_running") or 0) + (total(page, "vllm:num_requests_waiting") or 0))

    @contextlib.asynccontextmanager
    async def gateway(self, *settings: str, ready: bool = True, **more: Any) -> AsyncIterator[House]:
        """A gateway in front of the engine, up and quiet."""
        async with gateway(self.fresh_folder(), *settings, model=MODEL, engine=self.url, **more) as house:
            if ready:
                await house.ready()
            yield house

    @contextlib.asynccontextmanager
    async def simulated(self, *settings: str, ready: bool = True, flags: Sequence[str] = ()) -> AsyncIterator[House]:
        """A gateway with its own simulated engine, up and quiet."""
        async with gateway(self.fresh_folder(), *settings, model="llama-3-8b", flags=flags) as house:
            if ready:
                await house.ready()
            yield house

    def fresh_folder(self) -> Path:
        """A folder of a gateway's own."""
        self._count += 1
        return self.folder / f"gateway-{self._count}"

    def kill_engine(self) -> None:
        """End it as a crash would, with all its processes."""
        assert self.server is not None
        self.server.kill()


async def stopped(house: House, within_s: float, number: int = signal.SIGTERM) -> int:
    """Send a signal and wait for the end."""
    house.kill(number)
    return await house.ended(within_s)
