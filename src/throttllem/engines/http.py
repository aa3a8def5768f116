"""HTTP towards one engine: bytes on as they came, bytes back as they come, every failure an EngineError.

Knows nothing of what the bytes mean. Redirects are not followed and no proxy is used: only the configured address is
ever spoken to. Connections are kept for a moment and used again.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

from pydantic_core import from_json

from throttllem.engines.base import Call, EngineError, Headers, Reply
from throttllem.engines.connection import Connection, SpeechError

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
KEEP_ALIVE_S = 1.5
"""Below the idle time after which common servers close a connection (2 to 5 s): none is closed under a request."""


def passed_on(headers: Headers, dropped: frozenset[str] = HOP_BY_HOP) -> Headers:
    """The headers without those in `dropped` and those that a `connection` header names."""
    named = {token.strip().lower() for name, value in headers if name == "connection" for token in value.split(",")}
    return tuple((name, value) for name, value in headers if name not in dropped and name not in named)


def requested(headers: Headers, *, api_key: str | None = None, plain: bool = False) -> Headers:
    """A client's headers as an engine gets them; `plain`: the reply must not be compressed, as it is read here."""
    kept = [pair for pair in passed_on(headers, NOT_SENT) if not pair[0].startswith(OURS)]
    if api_key is not None:
        kept = [pair for pair in kept if pair[0] != "authorization"] + [("authorization", f"Bearer {api_key}")]
    if plain:
        kept = [pair for pair in kept if pair[0] != "accept-encoding"] + [("accept-encoding", "identity")]
    return tuple(kept)


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
    if isinstance(error, _UnreachedError):
        told = "the engine cannot be reached"
        if isinstance(error.cause, TimeoutError):
            return EngineError(f"no connection to the engine at {url} in time", status=504, told=told)
        return EngineError(f"the engine at {url} cannot be reached: {error.cause}", told=told)
    if isinstance(error, TimeoutError):
        return EngineError(f"the engine at {url} did not answer in time", status=504)
    if isinstance(error, OSError):
        return EngineError(f"the engine at {url} broke off the connection", told="the engine broke off")
    told = "the engine does not speak HTTP as it should"
    return EngineError(f"the engine at {url} does not speak HTTP as it should: {error}", told=told)


def parsed(where: str, body: bytes) -> object:
    """The JSON that was answered. Raises EngineError if it is none."""
    try:
        return from_json(body)
    except ValueError as error:
        raise EngineError(f"{where} answers what is no JSON: {error}") from error


class Upstream:
    """One engine's address. `url` without a trailing slash or with; paths begin with one and may hold a query."""

    def __init__(self, url: str, *, api_key: str | None = None, connect_s: float = 5.0) -> None:
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._connect_s = connect_s
        at = urlsplit(self.url)
        self._host, self._port = at.hostname or "", at.port or (443 if at.scheme == "https" else 80)
        self._secure, self._base = at.scheme == "https", at.path
        self._head = f"Host: {at.netloc.rpartition('@')[2]}\r\n"
        self._context: ssl.SSLContext | None = None
        self._all: set[Connection] = set()
        self._idle: list[Connection] = []
        self._sweeps: asyncio.TimerHandle | None = None

    async def get(self, path: str, *, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """Status and body. Raises EngineError if there is no answer in `timeout_s`."""
        return await self._ask("GET", path, None, timeout_s)

    async def get_json(self, path: str, *, timeout_s: float = 5.0) -> object:
        """The JSON at `path`. Raises EngineError for anything but a 200 with JSON."""
        return self._json(path, *await self._ask("GET", path, None, timeout_s))

    async def post(self, path: str, content: bytes, *, timeout_s: float = 30.0) -> tuple[int, bytes]:
        """Status and body of the answer to a JSON document. Raises EngineError if there is none in `timeout_s`."""
        return await self._ask("POST", path, content, timeout_s)

    def open(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """Send `call`; its reply lasts as long as the block. Leaving early closes the connection."""
        return self._reply(call)

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

    async def _connection(self) -> tuple[Connection, bool]:
        """One that is open, and whether it was used before."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and time.monotonic() - connection.idle_since_s < KEEP_ALIVE_S:
                return connection, True
            self._drop(connection)
        if self._secure and self._context is None:
            self._context = ssl.create_default_context()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, self._host, self._port, ssl=self._context
                )
        except OSError as error:
            raise _UnreachedError(error) from error
        self._all.add(connection)
        return connection, False

    def _keep(self, connection: Connection) -> None:
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

    def _request(self, method: str, path: str, headers: Headers, body: bytes) -> bytes:
        """The head of a request. Raises ValueError for what could name another host or begin another line."""
        if not path.startswith("/"):
            raise ValueError(f"path {path!r}: must begin with /")
        lines = [f"{method} {self._base}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError(f"{method} {path!r}: a line break in the path or in a header")
        length = f"Content-Length: {len(body)}\r\n" if body or method not in ("GET", "DELETE") else ""
        first, *others = lines
        return "\r\n".join([f"{first}\r\n{self._head}{length}".removesuffix("\r\n"), *others, "", ""]).encode("latin-1")

    async def _sent(
        self, method: str, path: str, headers: Headers, body: bytes
    ) -> tuple[Connection, tuple[int, Headers]]:
        """A request that has the head of its reply; a kept connection that closed under a GET costs a second try."""
        request = self._request(method, path, headers, body)
        while True:
            connection, used = await self._connection()
            try:
                connection.send(request, body)
                return connection, await connection.head()
            except ConnectionError:
                self._drop(connection)
                if not used or method != "GET":
                    raise
            except BaseException:
                self._drop(connection)
                raise

    async def _ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
        pairs = [("Accept", "*/*") if body is None else ("Content-Type", "application/json")]
        if self._api_key is not None:
            pairs.append(("Authorization", f"Bearer {self._api_key}"))
        try:
            async with asyncio.timeout(timeout_s):
                connection, (status, _) = await self._sent(method, path, tuple(pairs), body or b"")
                try:
                    parts = []
                    while part := await connection.read():
                        parts.append(part)
                finally:
                    self._keep(connection)
        except (_UnreachedError, SpeechError, OSError) as error:
            raise engine_error(self.url, error) from error
        return status, b"".join(parts)

    def _json(self, path: str, status: int, body: bytes) -> object:
        if status != 200:
            raise EngineError(f"{self.url}{path} answers {status}: {body[:200].decode(errors='replace')}")
        return parsed(f"{self.url}{path}", body)

    @asynccontextmanager
    async def _reply(self, call: Call) -> AsyncIterator[Reply]:
        headers = requested(call.headers, api_key=self._api_key, plain=call.ask is not None)
        try:
            connection, (status, got) = await self._sent(call.method, call.path, headers, call.body)
        except (_UnreachedError, SpeechError, OSError) as error:
            raise engine_error(self.url, error) from error

        async def read() -> bytes:
            try:
                return await connection.read()
            except (SpeechError, OSError) as error:
                raise engine_error(self.url, error) from error

        try:
            yield Reply(status=status, headers=passed_on(got), read=read)
        finally:
            self._keep(connection)
