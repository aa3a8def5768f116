"""The gateway's sockets: bound early, served by uvicorn's HTTP on the running loop, drained at a signal.

First SIGTERM or SIGINT: running requests finish within limits.drain_s. Second: everything ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

from starlette.types import ASGIApp
from uvicorn.server import ServerState

from throttllem.config import LimitOptions, Options, ServerOptions
from throttllem.gateway.bounds.connections import Client, Crowd
from throttllem.gateway.http.app import Gateway
from throttllem.gateway.http.protocol import BoundedConfig, BoundedProtocol

log = logging.getLogger("throttllem.gateway")

_BACKLOG = 2048
_WATCH_AGAIN_S = 1.0
_CUT_S = 1.0
"""How long an exchange that is cut off has to send its error."""
_FLUSH_S = 1.0
"""How long the last bytes may take on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sockets:
    """Bound, not listening yet. `private` None: there is no metrics port."""

    api: socket.socket
    private: socket.socket | None = None

    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each, the API's first; port 0 of the options is the real one here."""
        return tuple(sock.getsockname()[:2] for sock in (self.api, self.private) if sock is not None)

    def close(self) -> None:
        """Give the ports back."""
        for sock in (self.api, self.private):
            if sock is not None:
                sock.close()


def bind(server: ServerOptions) -> Sockets:
    """Take the ports. Raises OSError that names the one that cannot be had."""
    api = _bound(server.host, server.port, "server.port")
    if server.metrics_port is None:
        return Sockets(api=api)
    try:
        return Sockets(api=api, private=_bound(server.metrics_host, server.metrics_port, "server.metrics_port"))
    except OSError:
        api.close()
        raise


async def run(
    gateway: Gateway,
    private_app: ASGIApp | None,
    options: Options,
    *,
    sockets: Sockets | None = None,
    on_listening: Callable[[tuple[tuple[str, int], ...]], None] | None = None,
    on_drain: Callable[[], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until a signal (or `stop`), then drain; returns when all is done. Raises OSError if a port is taken."""
    sockets = sockets or bind(options.server)
    stop = stop or asyncio.Event()
    hurry = asyncio.Event()
    listeners: list[_Listener] = []
    watch = asyncio.create_task(_watch(gateway))
    try:
        apps = ((gateway, sockets.api), (private_app, sockets.private))
        for app, sock in apps:
            if app is not None and sock is not None:
                listeners.append(await _Listener.open(app, sock, options.limits))
        with _signals(stop, hurry):
            if on_listening is not None:
                on_listening(sockets.addresses())
            await stop.wait()
            gateway.drain()
            if on_drain is not None:
                on_drain()
            await _drain(gateway, options.limits.drain_s, hurry)
    finally:
        watch.cancel()
        await asyncio.wait({watch})
        for listener in listeners:
            await listener.close(0.0 if hurry.is_set() else _FLUSH_S)
        sockets.close()


async def _watch(gateway: Gateway) -> None:
    """Slow clients are cut off to the end, whatever goes wrong in between."""
    while True:
        try:
            await gateway.watch()
        except Exception:
            log.exception("slow clients were not looked after this time")
        await asyncio.sleep(_WATCH_AGAIN_S)


async def _drain(gateway: Gateway, drain_s: float, hurry: asyncio.Event) -> None:
    idle = asyncio.create_task(gateway.idle())
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({idle, hurried}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    if not idle.done():
        gateway.cut()
        await asyncio.wait({idle}, timeout=0.05 if hurry.is_set() else _CUT_S)
    for task in (idle, hurried):
        task.cancel()


class _Listener:
    """One listening socket and its connections."""

    def __init__(self, server: asyncio.Server, state: ServerState) -> None:
        self._server = server
        self._state = state

    @classmethod
    async def open(cls, app: ASGIApp, sock: socket.socket, limits: LimitOptions) -> _Listener:
        config = BoundedConfig(app, limits)
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        try:
            make = partial(BoundedProtocol, config, state)
            crowd = Crowd(limits.connections, cast(set[Client], state.connections))
            server = await loop.create_server(lambda: crowd.accept(make), sock=sock, backlog=_BACKLOG)
        except OSError as error:
            raise _taken(error, "port", *sock.getsockname()[:2]) from error
        return cls(server, state)

    async def close(self, flush_s: float) -> None:
        """Take no more connections, close the idle ones, and after `flush_s` break off whatever is left."""
        self._server.close()
        for connection in self._made():
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(flush_s):
                while self._state.connections:
                    await asyncio.sleep(0.005)
        for connection in self._made():
            connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=_CUT_S)

    def _made(self) -> list[BoundedProtocol]:
        """The connections, without those that were accepted a moment ago."""
        connections = cast(set[BoundedProtocol], self._state.connections)
        return [connection for connection in connections if connection.transport is not None]


@contextlib.contextmanager
def _signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """The first signal sets `stop`, the next `hurry`; only in the main thread, where signal handlers can be set."""
    loop = asyncio.get_running_loop()
    handled: list[signal.Signals] = []

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            loop.add_signal_handler(number, on_signal)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _bound(host: str, port: int, option: str) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"server.host = {host!r}: {error.strerror}") from error
    # A name like localhost may have an address of each kind; clients try IPv4 in any case.
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _taken(error, option, host, port) from error
    return sock


def _taken(error: OSError, option: str, host: str, port: int) -> OSError:
    taken = OSError(f"{option} = {port}: cannot listen on {host}:{port}: {error.strerror}")
    taken.errno = error.errno  # set afterwards, it is not part of the message
    return taken
