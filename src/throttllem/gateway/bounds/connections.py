"""How many clients are connected: at the limit, idle connections are closed for a new one, or the new one is refused.

A refused connection costs no parser: it gets a fixed answer. A few connections over the limit are read all the same, so
that `/health` is served then too. A connection that was accepted below the limit is never refused later.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from throttllem.openai_api.errors import ApiError

RETRY_S = 1
_OVER = 32
"""Connections over the limit that are still read."""
_LINGERING = 64
"""Refused clients that are given time to read the answer."""
_LINGER_S = 0.5
_READ_BYTES = 64 * 1024
_LOOK_AGAIN_S = 0.05
_FRESH_S = 0.1
"""A connection is not idle yet for this time: its request is on its way."""


def too_many_connections() -> ApiError:
    """503: more than limits.connections."""
    headers = ((b"connection", b"close"),)
    return ApiError(503, "too many connections", code="too_many_connections", retry_after_s=RETRY_S, headers=headers)


class Client(Protocol):
    """One connection of the server. `crowded`: it was accepted over the limit."""

    crowded: bool

    @property
    def idle_since_s(self) -> float | None:
        """When it began to wait for a request, on the loop's clock; None: it does not."""

    def close_idle(self) -> None:
        """Close it, and leave the server's collection."""


ClientT = TypeVar("ClientT", bound=Client)


class Crowd:
    """The connections of one port. `connections` is the server's own collection."""

    def __init__(self, most: int, connections: set[Client]) -> None:
        self._most = most
        self._connections = connections
        self._idle: deque[Client] = deque()
        self._looked_s = -1.0
        self._lingering: set[asyncio.BaseTransport] = set()

    def accept(self, make: Callable[[], ClientT]) -> ClientT | _Refusal:
        """The protocol of a new connection: `make`'s, or one that refuses it."""
        if len(self._connections) >= self._most:
            self._close_idle()
        count = len(self._connections)
        if count >= self._most + _OVER:
            return _Refusal(self._lingering)
        client = make()
        client.crowded = count >= self._most
        self._connections.add(client)  # now: the loop accepts many before it makes the first connection
        return client

    def _close_idle(self) -> None:
        """Close those that have been idle for longest until there is room for one, or none is left."""
        now_s = asyncio.get_running_loop().time()
        if not self._idle and now_s - self._looked_s > _LOOK_AGAIN_S:
            idle = [(since_s, client) for client in self._connections if (since_s := client.idle_since_s) is not None]
            self._idle = deque(client for _, client in sorted(idle, key=lambda one: one[0]))
            self._looked_s = now_s
        while self._idle and len(self._connections) >= self._most:
            client = self._idle.popleft()
            since_s = client.idle_since_s
            if since_s is not None and now_s - since_s >= _FRESH_S and client in self._connections:
                client.close_idle()


class _Refusal(asyncio.Protocol):
    """Answers 503 to the first bytes that come, or after a while, and closes."""

    def __init__(self, lingering: set[asyncio.BaseTransport]) -> None:
        self._lingering = lingering
        self._transport: asyncio.Transport | None = None
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Closing with bytes unread would reset the connection, and the client might never see why.
        if len(self._lingering) >= _LINGERING:
            self._transport.write(_REFUSED)
            with contextlib.suppress(OSError):
                os.read(self._transport.get_extra_info("socket").fileno(), _READ_BYTES)
            self._transport.close()
            return
        self._lingering.add(transport)
        asyncio.get_running_loop().call_later(_LINGER_S, self._end)

    def data_received(self, data: bytes) -> None:
        if not self._answered:  # a client may take an answer before its request for a fault
            self._answer()

    def eof_received(self) -> None:
        if not self._answered:
            self._answer()

    def _answer(self) -> None:
        assert self._transport is not None
        self._answered = True
        self._transport.write(_REFUSED)
        self._transport.write_eof()

    def _end(self) -> None:
        assert self._transport is not None
        if self._answered:
            self._transport.abort()
        elif not self._transport.is_closing():
            self._answer()
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._lingering.discard(self._transport)


def _refused() -> bytes:
    error = too_many_connections()
    named = ((b"content-type", b"application/json"), (b"content-length", str(len(error.body)).encode()))
    lines = [b"%s: %s\r\n" % header for header in named + error.headers]
    return b"HTTP/1.1 503 Service Unavailable\r\n" + b"".join(lines) + b"\r\n" + error.body


_REFUSED = _refused()
