"""One HTTP/1.1 connection to an engine: a request goes out, its reply comes in as it arrives. Knows no address.

Every token of every answer passes here, so it does what a stream of small chunks needs and nothing else: no redirects,
cookies, proxies or decompression. Its transport is paused while nobody takes what came.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

import httptools

from throttllem.engines.base import Headers

HEADER_BYTES = 64 * 1024
"""A reply's head must be whole in so many bytes."""
_HELD_BYTES = 64 * 1024
_JOINED_BYTES = 64 * 1024


class SpeechError(Exception):
    """What came is no HTTP as it should be."""


class Connection(asyncio.Protocol):
    """One request at a time: `send`, `head`, `read` until it gives nothing. `reusable` after that says if another may.

    Failures are raised once everything that came before them was read: ConnectionError if it broke off, SpeechError.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.reusable = False
        self.idle_since_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._status: int | None = None
        self._headers: list[tuple[str, str]] = []
        self._head_bytes = 0
        self._parts: deque[bytes] = deque()
        self._held = 0
        self._paused = False
        self._whole = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    # ---- for its user ----------------------------------------------------------------------------------------

    def send(self, head: bytes, body: bytes) -> None:
        """Send a request; the reply to the one before must have been read to its end."""
        assert self._transport is not None and self._parser is None
        self._parser = httptools.HttpResponseParser(self)
        self._status, self._headers, self._head_bytes = None, [], 0
        self._whole = self.reusable = False
        if len(body) > _JOINED_BYTES:
            self._transport.writelines([head, body])
        else:
            self._transport.write(head + body)

    async def head(self) -> tuple[int, Headers]:
        """Status and headers of the reply, names in lower case."""
        while self._status is None:
            await self._more()
        return self._status, tuple(self._headers)

    async def read(self) -> bytes:
        """What came of the body since the last call, waiting for it; nothing at its end."""
        while not self._parts:
            if self._whole:
                return b""
            await self._more()
        parts = self._parts
        data = parts.popleft() if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._held = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def let_go(self) -> bool:
        """The user is done: whether the connection may serve another. If not it closes, and waits for nobody."""
        if self._whole and self.reusable and self.is_open and not self._parts:
            self._parser = None
            return True
        self.close()
        return False

    def close(self) -> None:
        """Close it now."""
        self.is_open = False
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size():
            transport.abort()
        else:
            transport.close()

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # ---- for the transport -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Read on; an engine that speaks without being asked is not spoken to again."""
        parser = self._parser
        if parser is None:
            self.close()
            return
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._failed(SpeechError(str(error) or type(error).__name__))
            return
        if self._status is None:
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_BYTES:
                self._failed(SpeechError("a head without end"))
                return
        if self._held > _HELD_BYTES and not self._paused and self.is_open:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed: the end of a body that has no other, else a failure."""
        self.is_open = False
        if self._parser is not None and not self._whole:
            if exc is None and self._status is not None and not self._bounded():
                self._whole = True
            elif self._error is None:
                self._error = ConnectionResetError("broken off")
        self._wake()

    def _bounded(self) -> bool:
        return any(name in ("content-length", "transfer-encoding") for name, _ in self._headers)

    def _failed(self, error: Exception) -> None:
        if not self._whole:
            self._error = self._error or error
        self.reusable = False
        self.close()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- for the parser --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A head begins; after a whole reply, one that nobody asked for."""
        if self._whole:
            raise SpeechError("a reply too many")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one behind the body."""
        if self._status is None:
            self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """The head is whole, if it is not one of those that announce it."""
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status >= 200:
            self._status = status

    def on_body(self, data: bytes) -> None:
        """A part of the body."""
        self._parts.append(data)
        self._held += len(data)

    def on_message_complete(self) -> None:
        """The reply is whole."""
        assert self._parser is not None
        if self._status is None:
            self._headers.clear()
            return
        self._whole = True
        self.reusable = self._parser.should_keep_alive()
