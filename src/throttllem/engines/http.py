"""HTTP/1.1 to one engine: bytes on as they came, bytes back as they come, every failure an EngineError.

Knows nothing of what the bytes mean. Redirects are not followed and no proxy is used: requests go to the configured
address only. Connections are kept for a moment and used again. A client of our own, since every token of every stream
passes here: aiohttp costs 0.35 ms a request more, httpx more than that (docs/decisions.md).
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import cast
from urllib.parse import urlsplit

import httptools
from pydantic_core import from_json

from throttllem.engines.base import Call, EngineError, Headers, OwnLimitError, Reply

HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"}
    | {"te", "trailer", "trailers", "transfer-encoding", "upgrade"}
)
"""Headers that belong to one connection (RFC 9110, 7.6.1), in either direction."""
NOT_SENT = HOP_BY_HOP | {"host", "content-length", "expect"}
"""Headers of a client that an engine does not get; it gets our own where it needs them."""
OURS = ("x-slo-", "x-throttllem-")
"""How the gateway's own headers begin; engines do not get them."""
_USER = re.compile(r"(?:[^/?#]*:)?(?://)?[^/?#]*@")
_OWN_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
KEEP_ALIVE_S = 1.5
"""Below the idle time after which common servers close a connection (2 to 5 s): none is closed under a request."""


def requested(headers: Iterable[tuple[str, str]], *, api_key: str | None = None, plain: bool = False) -> Headers:
    """A client's headers as an engine gets them; `plain`: the reply must not be compressed."""
    kept = []
    for name, value in headers:
        replaced = (api_key is not None and name == "authorization") or (plain and name == "accept-encoding")
        if not (replaced or name in NOT_SENT or name.startswith(OURS)):
            kept.append((name, value))
        elif name == "connection":
            return requested(_without_named(headers, value), api_key=api_key, plain=plain)
    if api_key is not None:
        kept.append(("authorization", f"Bearer {api_key}"))
    if plain:
        kept.append(("accept-encoding", "identity"))
    return tuple(kept)


def passed_on(headers: Iterable[tuple[str, str]]) -> Headers:
    """An engine's headers without those that belong to one connection."""
    kept = []
    for name, value in headers:
        if name not in HOP_BY_HOP:
            kept.append((name, value))
        elif name == "connection":
            return passed_on(_without_named(headers, value))
    return tuple(kept)


def _without_named(headers: Iterable[tuple[str, str]], connection: str) -> Headers:
    """The headers without this `connection` header and those that it names."""
    named = {token.strip().lower() for token in connection.split(",")}
    return tuple(
        (name, value) for name, value in headers if name not in named and (name, value) != ("connection", connection)
    )


def check_address(name: str, url: str) -> None:
    """Refuse what is no address of HTTP. Raises ValueError that names the option and shows no password."""
    if _USER.match(url):
        raise ValueError(f"{name}: must hold no user and password; where the engine wants a key, set api_key")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{name} = {url!r}: must begin with http:// or https://")


class _UnreachedError(Exception):
    """There is no connection to be had; `cause` is the system's word."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def engine_error(url: str, error: Exception) -> EngineError:
    """A failure with its status, and in words for the log and for clients."""
    if (limit := _own_limit(error)) is not None:
        return OwnLimitError(f"no connection to the engine at {url}: {limit.strerror or limit}")
    if isinstance(error, _UnreachedError):
        message = "the engine cannot be reached"
        if isinstance(error.cause, TimeoutError):
            return EngineError(f"no connection to the engine at {url} in time", status=504, message=message)
        return EngineError(f"the engine at {url} cannot be reached: {error.cause}", message=message)
    if isinstance(error, TimeoutError):
        return EngineError(f"the engine at {url} did not answer in time", status=504)
    if isinstance(error, OSError):
        return EngineError(f"the engine at {url} broke off the connection", message="the engine broke off")
    message = "the engine does not speak HTTP as it should"
    return EngineError(f"the engine at {url} does not speak HTTP as it should: {error}", message=message)


def _own_limit(error: Exception) -> OSError | None:
    """The system's word that this machine has no room for a connection; None: the failure has another cause."""
    cause = error.cause if isinstance(error, _UnreachedError) else error
    if isinstance(cause, OSError) and cause.errno in _OWN_LIMITS:
        return cause
    if not isinstance(cause, socket.gaierror):
        return None
    try:  # a name cannot be looked up without a descriptor, and the error does not say so
        socket.socket().close()
    except OSError as found:
        return found
    return None


def parsed(where: str, body: bytes) -> object:
    """The JSON that was answered. Raises EngineError if it is none."""
    try:
        return from_json(body)
    except ValueError as error:
        raise EngineError(f"{where} answers what is no JSON: {error}") from error


HEADER_BYTES = 64 * 1024
"""A reply's head must be whole in so many bytes."""
MOST_HEADERS = 256
PAGE_BYTES = 4 * 1024 * 1024
"""The largest page that an engine may answer to the gateway's own questions; a vLLM's metrics have 0.1 MB."""
ANSWER_BYTES = 64 * 1024 * 1024
"""The same for an answer to a document: the token ids of a prompt as large as a body may be."""
_HELD_BYTES = 64 * 1024
_JOINED_BYTES = 64 * 1024


class ProtocolError(Exception):
    """What came is not valid HTTP."""


class Connection(asyncio.Protocol):
    """One request at a time: `send`, `head`, `read` until it returns nothing; then `reusable` tells whether another
    request may go. Its transport is paused while nobody reads what came.

    Failures are raised once everything that came before them was read: ConnectionError if it broke off, ProtocolError;
    `read` raises an EngineError in their place where the connection knows the engine's `url`.
    """

    def __init__(self, url: str | None = None) -> None:
        self._url = url
        self.is_open = False
        self.reusable = False
        self.idle_since_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._status: int | None = None
        self._headers: list[tuple[str, str]] = []
        self._head_bytes = 0
        self._parts: deque[bytes] = deque()
        self.on_body = self._parts.append  # httptools calls it for each part of a body
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
        self._held = 0
        if len(body) > _JOINED_BYTES:
            self._transport.writelines([head, body])
        else:
            self._transport.write(head + body)

    async def head(self) -> tuple[int, Headers]:
        """Status and headers of the reply, names in lower case."""
        while self._status is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._status, tuple(self._headers)

    async def read(self) -> bytes:
        """What came of the body since the last call, waiting for it; nothing at its end."""
        parts = self._parts
        while not parts:
            if self._whole:
                return b""
            if self._error is not None:
                if self._url is None:
                    raise self._error
                raise engine_error(self._url, self._error) from self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
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

    # ---- for the transport -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Read on. An engine that sends what nobody requested gets no further request."""
        parser = self._parser
        if parser is None:
            self.close()
            return
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._failed(ProtocolError(str(error) or type(error).__name__))
            return
        if self._status is None:
            self._head_bytes += len(data)
            if self._head_bytes > HEADER_BYTES:
                self._failed(ProtocolError("a head without end"))
                return
        if self._parts:  # what holds no part of a body (a head, trailers) is not waiting to be read
            self._held += len(data)
        if self._held > _HELD_BYTES and not self._paused and self.is_open:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed: the end of a body that has no other, else a failure."""
        self.is_open = False
        if self._parser is not None and not self._whole:
            if exc is None and self._status is not None and not self._bounded():
                self._whole = True
            elif self._error is None:
                own_limit = isinstance(exc, OSError) and exc.errno in _OWN_LIMITS
                self._error = exc if own_limit else ConnectionResetError("broken off")
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

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one behind the body."""
        if self._status is not None:
            return
        self._head_bytes += len(name) + len(value) + len(": \r\n")
        if self._head_bytes > HEADER_BYTES or len(self._headers) >= MOST_HEADERS:
            raise ProtocolError("too many headers, or too large ones")
        self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """The head is whole, if it is not one of those that announce it. The parser has refused control characters, and
        a length beside chunks.
        """
        if self._whole:
            raise ProtocolError("a reply too many")
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status > 599:
            raise ProtocolError(f"a status of {status}")
        if any(name == "transfer-encoding" and value.lower() != "chunked" for name, value in self._headers):
            raise ProtocolError("a transfer encoding that is not chunked")
        if status >= 200:
            self._status = status

    def on_message_complete(self) -> None:
        """The reply is whole."""
        assert self._parser is not None
        if self._status is None:
            self._headers.clear()
            return
        self._whole = True
        self.reusable = self._parser.should_keep_alive()


class Upstream:
    """One engine's address. `url` without a trailing slash or with; paths begin with one and may hold a query."""

    def __init__(self, url: str, *, api_key: str | None = None, connect_s: float = 5.0) -> None:
        self.url = url.rstrip("/")
        self.api_key = api_key
        self._connect_s = connect_s
        at = urlsplit(self.url)
        self._host, self._port = at.hostname or "", at.port or (443 if at.scheme == "https" else 80)
        self._secure, self._base = at.scheme == "https", at.path
        self._host_line = f"Host: {at.netloc.rpartition('@')[2]}"
        self._context: ssl.SSLContext | None = None
        self._all: set[Connection] = set()
        self._idle: list[Connection] = []
        self._sweeps: asyncio.TimerHandle | None = None

    async def get(self, path: str, *, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """Status and body. Raises EngineError if there is no answer in `timeout_s`."""
        return await self._ask("GET", path, None, timeout_s, PAGE_BYTES)

    async def get_json(self, path: str, *, timeout_s: float = 5.0) -> object:
        """The JSON at `path`. Raises EngineError for anything but a 200 with JSON."""
        return self._json(path, *await self._ask("GET", path, None, timeout_s, PAGE_BYTES))

    async def post(self, path: str, content: bytes, *, timeout_s: float = 30.0) -> tuple[int, bytes]:
        """Status and body of the answer to a JSON document. Raises EngineError if there is none in `timeout_s`."""
        return await self._ask("POST", path, content, timeout_s, ANSWER_BYTES)

    def open(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """Send `call`; its reply lasts as long as the block. Leaving early closes the connection."""
        return _Exchange(self, call)

    async def close(self) -> None:
        """Close every connection; a later request opens new ones."""
        if self._sweeps is not None:
            self._sweeps.cancel()
            self._sweeps = None
        for connection in tuple(self._all):
            connection.close()
        self._all.clear()
        self._idle.clear()

    # ---- connections -----------------------------------------------------------------------------------------

    def _take_kept(self) -> Connection | None:
        """A connection that was kept and is still open."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and time.monotonic() - connection.idle_since_s < KEEP_ALIVE_S:
                return connection
            self._drop(connection)
        return None

    async def _connect(self) -> Connection:
        if self._secure and self._context is None:
            self._context = ssl.create_default_context()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self.url), self._host, self._port, ssl=self._context
                )
        except OSError as error:
            raise _UnreachedError(error) from error
        self._all.add(connection)
        return connection

    def keep(self, connection: Connection) -> None:
        """A reply is over, read to its end or not."""
        if connection not in self._all or not connection.let_go():
            self._drop(connection)
            return
        connection.idle_since_s = time.monotonic()
        self._idle.append(connection)
        if self._sweeps is None:
            self._sweeps = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._sweep)

    def _drop(self, connection: Connection) -> None:
        connection.close()
        self._all.discard(connection)

    def _sweep(self) -> None:
        """Close what nobody used for a while."""
        self._sweeps = None
        before_s = time.monotonic() - KEEP_ALIVE_S
        for connection in [one for one in self._idle if one.idle_since_s <= before_s or not one.is_open]:
            self._idle.remove(connection)
            self._drop(connection)
        if self._idle:
            self._sweeps = asyncio.get_running_loop().call_later(KEEP_ALIVE_S / 2, self._sweep)

    # ---- requests --------------------------------------------------------------------------------------------

    async def sent(
        self, method: str, path: str, headers: Iterable[tuple[str, str]], body: bytes
    ) -> tuple[Connection, int, Headers]:
        """A connection whose request is sent, with status and headers of the reply. A kept connection that closed under
        a GET costs a second try. Raises ValueError for what could name another host or begin another line.
        """
        if not path.startswith("/"):
            raise ValueError(f"path {path!r}: must begin with /")
        lines = [f"{method} {self._base}{path} HTTP/1.1", self._host_line]
        if body or method not in ("GET", "DELETE"):
            lines.append(f"Content-Length: {len(body)}")
        for name, value in headers:
            lines.append(f"{name}: {value}")
        text = "\r\n".join(lines)
        if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
            raise ValueError(f"{method} {path!r}: a line break in the path or in a header")
        request = f"{text}\r\n\r\n".encode("latin-1")
        while True:
            kept = self._take_kept()
            connection = kept or await self._connect()
            try:
                connection.send(request, body)
                status, got = await connection.head()
                return connection, status, got
            except ConnectionError:
                self._drop(connection)
                if kept is None or method != "GET":
                    raise
            except BaseException:
                self._drop(connection)
                raise

    async def _ask(
        self, method: str, path: str, body: bytes | None, timeout_s: float, most_bytes: int
    ) -> tuple[int, bytes]:
        pairs = [("Accept", "*/*") if body is None else ("Content-Type", "application/json")]
        if self.api_key is not None:
            pairs.append(("Authorization", f"Bearer {self.api_key}"))
        try:
            async with asyncio.timeout(timeout_s):
                connection, status, _ = await self.sent(method, path, pairs, body or b"")
                try:
                    parts, left_bytes = [], most_bytes
                    while part := await connection.read():
                        parts.append(part)
                        left_bytes -= len(part)
                        if left_bytes < 0:
                            raise EngineError(f"{self.url}{path} answers more than {most_bytes} bytes")
                finally:
                    self.keep(connection)
        except (_UnreachedError, ProtocolError, OSError) as error:
            raise engine_error(self.url, error) from error
        return status, b"".join(parts)

    def _json(self, path: str, status: int, body: bytes) -> object:
        if status != 200:
            raise EngineError(f"{self.url}{path} answers {status}: {body[:200].decode(errors='replace')}")
        return parsed(f"{self.url}{path}", body)


class _Exchange:
    """One request and its reply, as an asynchronous context manager."""

    __slots__ = ("_call", "_connection", "_upstream")

    def __init__(self, upstream: Upstream, call: Call) -> None:
        self._upstream = upstream
        self._call = call
        self._connection: Connection | None = None

    async def __aenter__(self) -> Reply:
        """Send the request; the head of its reply, which must not be compressed if its tokens are counted here."""
        upstream, call = self._upstream, self._call
        headers = requested(call.headers, api_key=upstream.api_key, plain=call.request is not None)
        try:
            self._connection, status, got = await upstream.sent(call.method, call.path, headers, call.body)
        except (_UnreachedError, ProtocolError, OSError) as error:
            raise engine_error(upstream.url, error) from error
        return Reply(status=status, headers=passed_on(got), read=self._connection.read)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """The connection may serve another request if the reply was read to its end, else it is closed."""
        assert self._connection is not None
        self._upstream.keep(self._connection)
