"""HTTP towards one engine: bytes on as they came, bytes back as they come, every failure an EngineError.

Knows nothing of what the bytes mean. Redirects are not followed and no proxy is used: only the configured address is
ever spoken to.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import aiohttp
from pydantic_core import from_json, to_json
from yarl import URL

from throttllem.engine.live import Call, EngineError, Headers, Reply

HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"}
    | {"te", "trailer", "trailers", "transfer-encoding", "upgrade"}
)
"""Headers that belong to one connection (RFC 9110, 7.6.1), in either direction."""
NOT_SENT = HOP_BY_HOP | {"host", "content-length", "expect"}
"""Headers of a client that an engine does not get; the HTTP library writes its own where it needs them."""
OURS = ("x-slo-", "x-throttllem-")
"""How the gateway's own headers begin; engines do not get them."""
AUTOMATIC = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
KEEP_ALIVE_S = 1.5
"""Below the idle time after which common servers close a connection (2 to 5 s): none is closed under a request."""
HEADER_BYTES = 64 * 1024


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


def engine_error(url: str, error: Exception) -> EngineError:
    """What a client should see of a failure of aiohttp or of the system."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return EngineError(f"no connection to the engine at {url} in time", status=504)
    if isinstance(error, TimeoutError):
        return EngineError(f"the engine at {url} did not answer in time", status=504)
    if isinstance(error, aiohttp.ClientConnectorError):
        return EngineError(f"the engine at {url} cannot be reached: {error.os_error}")
    if isinstance(error, aiohttp.ClientConnectionError | OSError):
        return EngineError(f"the engine at {url} broke off the connection")
    return EngineError(f"the engine at {url} does not speak HTTP as it should: {type(error).__name__}")


def parsed(where: str, body: bytes) -> object:
    """The JSON that was answered. Raises EngineError if it is none."""
    try:
        return from_json(body)
    except ValueError as error:
        raise EngineError(f"{where} answers what is no JSON: {error}") from error


class _Chunks:
    """The bytes of a reply as they come; an object rather than a generator, which costs more per chunk."""

    def __init__(self, url: str, response: aiohttp.ClientResponse) -> None:
        self._url = url
        self._read = response.content.readany

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._read()
        except (aiohttp.ClientError, OSError) as error:
            raise engine_error(self._url, error) from error
        if not chunk:
            raise StopAsyncIteration
        return chunk


class Upstream:
    """One engine's address. `url` without a trailing slash or with; paths begin with one and may hold a query."""

    def __init__(self, url: str, *, api_key: str | None = None, connect_s: float = 5.0) -> None:
        self.url = url.rstrip("/")
        self._api_key = api_key
        self._connect_s = connect_s
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, *, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """Status and body. Raises EngineError if there is no answer in `timeout_s`."""
        return await self._ask("GET", path, None, timeout_s)

    async def get_json(self, path: str, *, timeout_s: float = 5.0) -> object:
        """The JSON at `path`. Raises EngineError for anything but a 200 with JSON."""
        return self._json(path, *await self._ask("GET", path, None, timeout_s))

    async def post(self, path: str, content: bytes, *, timeout_s: float = 30.0) -> tuple[int, bytes]:
        """Status and body of the answer to a JSON document. Raises EngineError if there is none in `timeout_s`."""
        return await self._ask("POST", path, content, timeout_s)

    async def post_json(self, path: str, body: object, *, timeout_s: float = 30.0) -> object:
        """The JSON answered to a JSON body. Raises EngineError for anything but a 200 with JSON."""
        return self._json(path, *await self._ask("POST", path, to_json(body), timeout_s))

    def open(self, call: Call) -> AbstractAsyncContextManager[Reply]:
        """Send `call`; its reply lasts as long as the block. Leaving early closes the connection."""
        return self._reply(call)

    async def close(self) -> None:
        """Close every connection; a later request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=AUTOMATIC,
                auto_decompress=False,
                max_line_size=HEADER_BYTES,
                max_field_size=HEADER_BYTES,
            )
        return self._session

    def _address(self, path: str) -> URL:
        # Anything else could name another host ("@other", ".other:80").
        if not path.startswith("/"):
            raise ValueError(f"path {path!r}: must begin with /")
        return URL(self.url + path, encoded=True)

    async def _ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
        headers = {"accept": "*/*"} if body is None else {"content-type": "application/json"}
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        limit = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self._connect_s)
        try:
            async with self._opened().request(
                method, self._address(path), headers=headers, data=body, timeout=limit, allow_redirects=False
            ) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise engine_error(self.url, error) from error

    def _json(self, path: str, status: int, body: bytes) -> object:
        if status != 200:
            raise EngineError(f"{self.url}{path} answers {status}: {body[:200].decode(errors='replace')}")
        return parsed(f"{self.url}{path}", body)

    @asynccontextmanager
    async def _reply(self, call: Call) -> AsyncIterator[Reply]:
        try:
            response = await self._opened().request(
                call.method,
                self._address(call.path),
                headers=requested(call.headers, api_key=self._api_key, plain=call.ask is not None),
                data=call.body or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            raise engine_error(self.url, error) from error
        try:
            headers = tuple(
                (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.raw_headers
            )
            yield Reply(status=response.status, headers=passed_on(headers), chunks=_Chunks(self.url, response))
        finally:
            # No effect on a reply read to its end, whose connection is kept.
            response.close()
