"""How many clients are connected: over the limit, an idle connection is closed for a new one, or the new one refused.

A refused connection costs no parser: it gets a fixed answer. A few connections over the limit are read all the same, so
that `/health` is served then too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol, cast

from throttllem.openai_api.errors import ApiError

RETRY_S = 1
_OVER = 32
"""Connections over the limit that are still read."""
_LINGERING = 64
"""Refused clients that are given time to read the answer."""
_LINGER_S = 0.5
_READ_BYTES = 64 * 1024
_LOOK_AGAIN_S = 0.05


def too_many_connections() -> ApiError:
    """503: more than limits.connections."""
    headers = ((b"connection", b"close"),)
    return ApiError(503, "too many connections", code="too_many_connections", retry_after_s=RETRY_S, headers=headers)


class Client(Protocol):
    """One connection of the server."""

    @property
    def idle_since_s(self) -> float | None:
        """When it began to wait for a request, on any clock that all share; None: it does not."""

    def close_idle(self) -> None:
        """Close it, and leave the server's collection."""


class Crowd:
    """The connections of one port. `connections` is the server's own collection."""

    def __init__(self, most: int, connections: Collection[object]) -> None:
        self._most = most
        self._connections = connections
        self._idle: deque[Client] = deque()
        self._looked_s = -1.0
        self._lingering: set[asyncio.BaseTransport] = set()

    def accept(self, make: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """The protocol of a new connection: `make`'s, or one that refuses it."""
        count = len(self._connections)
        if count < self._most or self._close_idle() or count < self._most + _OVER:
            return make()
        return _Refusal(self._lingering)

    def _close_idle(self) -> bool:
        """Close the connection that has been idle for longest; False if none is."""
        if not self._idle and time.monotonic() - self._looked_s > _LOOK_AGAIN_S:
            clients = cast(Collection[Client], self._connections)
            idle = [(since_s, client) for client in clients if (since_s := client.idle_since_s) is not None]
            self._idle = deque(client for _, client in sorted(idle, key=lambda one: one[0]))
            self._looked_s = time.monotonic()
        while self._idle:
            client = self._idle.popleft()
            if client.idle_since_s is not None and client in self._connections:
                client.close_idle()
                return True
        return False


class _Refusal(asyncio.Protocol):
    """Answers 503 before anything is read, and closes."""

    def __init__(self, lingering: set[asyncio.BaseTransport]) -> None:
        self._lingering = lingering
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(_REFUSED)
        # Closing with bytes unread would reset the connection, and the client might never see why.
        if len(self._lingering) >= _LINGERING:
            with contextlib.suppress(OSError):
                os.read(self._transport.get_extra_info("socket").fileno(), _READ_BYTES)
            self._transport.close()
            return
        self._transport.write_eof()
        self._lingering.add(transport)
        asyncio.get_running_loop().call_later(_LINGER_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
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
