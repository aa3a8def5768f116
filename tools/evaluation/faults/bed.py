"""What every fault is tried on: an engine that comes and goes on one port, and gateways in front of it.

A fault is a coroutine `fault(bed) -> [Found]`; it raises AssertionError where the gateway does not bear it. The engine
is a real vLLM, or a small one that starts at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from throttllem.engines.capacity import total
from tools.testbed.engines import openai_engine as small
from tools.testbed.engines import vllm as real
from tools.testbed.inspected_gateway import Inspected, inspected_gateway
from tools.testbed.processes import Process, ProcessError, free_port, post

DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One row: what was done, what the clients saw, what was left behind."""

    fault: str
    client: str
    left: str


class Engine(Protocol):
    """A kind of engine on a port. `full`: it refuses the third request, `wide`: its answers are large (where they would
    not be anyway: `can_be_wide`).
    """

    model: str
    can_be_wide: bool

    async def start(self, port: int, *, full: bool, wide: bool) -> tuple[AbstractContextManager[Any], Process]:
        """A running engine, and what ends it. Raises ProcessError."""

    async def pause(self, bed: Bed, paused: bool) -> None:
        """Stand still with all requests in it, or go on."""

    def crash_workers(self, process: Process) -> bool:
        """End what computes, but not the API server; False: there is no such part."""


Fault = Callable[["Bed"], Coroutine[Any, Any, list[Found]]]


@dataclass(slots=True, kw_only=True)
class RealEngine:
    """vLLM of an environment."""

    environment: Path
    model_folder: Path
    folder: Path
    report: Callable[[str], None]
    model: str = real.MODEL
    can_be_wide: bool = False

    async def start(self, port: int, *, full: bool, wide: bool) -> tuple[AbstractContextManager[Any], Process]:
        """See `Engine`; tried twice."""
        flags = ("--max-num-seqs", "2", "--max-num-queued-reqs", "1") if full else ()
        for last in (False, True):
            manager = real.vllm(
                self.environment,
                self.folder,
                model=self.model_folder,
                flags=(*real.FLAGS, *flags),
                environment=DEVELOPMENT,
                port=port,
                report=self.report,
            )
            try:
                return manager, (await asyncio.to_thread(manager.__enter__)).process
            except ProcessError as error:
                if last:
                    raise
                self.report(f"{error}\nonce more")
        raise AssertionError

    async def pause(self, bed: Bed, paused: bool) -> None:
        """By vLLM's development API."""
        status, _ = await bed.ask("POST", "/pause?mode=keep" if paused else "/resume")
        assert status == 200

    def crash_workers(self, process: Process) -> bool:
        """The engine core's processes are children of the API server."""
        for pid in process.pids():
            if pid != process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return True


@dataclass(slots=True, kw_only=True)
class SmallEngine:
    """`openai_engine`, 500 tokens a second."""

    folder: Path
    model: str = small.MODEL
    can_be_wide: bool = True

    async def start(self, port: int, *, full: bool, wide: bool) -> tuple[AbstractContextManager[Any], Process]:
        """See `Engine`."""
        manager = small.openai_engine(self.folder / "engine.log", port=port)
        url, process = await asyncio.to_thread(manager.__enter__)
        pace = {"step_s": 0.002, "most": 2 if full else 10**9, "pad": 4000 if wide else 0}
        await asyncio.to_thread(post, f"{url}/pace", pace)
        return manager, process

    async def pause(self, bed: Bed, paused: bool) -> None:
        """Its process is stopped."""
        assert bed.process is not None
        bed.process.signal_group(signal.SIGSTOP if paused else signal.SIGCONT)

    def crash_workers(self, process: Process) -> bool:
        """It is one process."""
        return False


@dataclass(slots=True, kw_only=True)
class Bed:
    """One engine's address, behind which an engine comes and goes."""

    kind: Engine
    folder: Path
    report: Callable[[str], None]
    port: int = field(default_factory=free_port)
    process: Process | None = None
    _traits: tuple[bool, bool] = (False, False)
    _manager: AbstractContextManager[Any] | None = None
    _count: int = 0

    @property
    def url(self) -> str:
        """Where the engine is, or will be."""
        return f"http://127.0.0.1:{self.port}"

    async def engine(self, *, full: bool = False, wide: bool = False) -> None:
        """Have an engine with these traits up; the one that runs, if it has them."""
        traits = (full, wide and self.kind.can_be_wide)
        if self.process is not None and self._traits == traits and await self.answers():
            return
        await self.stop()
        self._traits = traits
        self._manager, self.process = await self.kind.start(self.port, full=full, wide=wide)

    async def stop(self) -> None:
        """End the engine, whatever state it is in."""
        manager, self._manager, self.process = self._manager, None, None
        if manager is not None:
            await asyncio.to_thread(manager.__exit__, None, None, None)

    def kill_engine(self) -> None:
        """End it as a crash would, with all its processes."""
        assert self.process is not None
        self.process.signal_group(signal.SIGKILL)

    async def answers(self) -> bool:
        """Whether a healthy engine is behind the address."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            return (await self.ask("GET", "/health"))[0] == 200
        return False

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Send the engine a request directly."""
        limit = aiohttp.ClientTimeout(total=60)
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.request(method, self.url + path, json=body) as got,
        ):
            return got.status, await got.read()

    async def running(self) -> int:
        """Requests in the engine, by its own count."""
        _, page = await self.ask("GET", "/metrics")
        return int((total(page, "vllm:num_requests_running") or 0) + (total(page, "vllm:num_requests_waiting") or 0))

    async def runs(self, count: int) -> bool:
        """Whether the engine holds at least `count` requests."""
        return await self.running() >= count

    @contextlib.asynccontextmanager
    async def gateway(
        self,
        *settings: str,
        url: str | None = None,
        model: str | None = None,
        folder: Path | None = None,
        port: int | None = None,
        ready: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Inspected]:
        """A gateway in front of the engine (or of another one), up and quiet."""
        arguments = ("--engine", url or self.url, *_set(*settings))
        async with inspected_gateway(
            folder or self.fresh_folder(),
            *arguments,
            model=model or self.kind.model,
            port=port,
            environment=environment,
        ) as gateway:
            if ready:
                await gateway.ready()
            yield gateway

    @contextlib.asynccontextmanager
    async def simulated(self, *settings: str) -> AsyncIterator[Inspected]:
        """A gateway with its own simulated engine, up and quiet."""
        async with inspected_gateway(self.fresh_folder(), *_set(*settings), model="llama-3-8b") as gateway:
            await gateway.ready()
            yield gateway

    def fresh_folder(self) -> Path:
        """A folder for one gateway."""
        self._count += 1
        return self.folder / f"gateway-{self._count}"


def _set(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", setting))
