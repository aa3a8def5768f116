"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: size and time of a request's head, connections at once.

Errors below ASGI have OpenAI's body too.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from throttllem.config import LimitOptions
from throttllem.gateway.http.errors import headers_too_large
from throttllem.gateway.http.exchange import ABORT, BUFFERED
from throttllem.openai_api.errors import ApiError

CROWDED = "throttllem.crowded"
"""The scope's extension that says: the connection was accepted over limits.connections, and still is over it."""
HEAD_S = 30.0
"""A request's head must be whole in this time."""
LINGER_S = 1.0
"""How long a client whose request was refused may go on sending."""
_PIPELINED = 16
"""Requests behind an unanswered one that are read. While nothing is read, a client that leaves is not seen to leave."""
KEEP_ALIVE_S = 75
"""Longer than common clients keep an idle connection, so that none is closed under a new request."""


class BoundedConfig(uvicorn.Config):
    """uvicorn's configuration for one application, with our limits."""

    def __init__(self, app: ASGIApp, limits: LimitOptions) -> None:
        super().__init__(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self.limits = limits


class _Unframed(RequestResponseCycle):
    """A reply to HTTP/1.0, which has no chunks: where its length is not known, the end of the connection is its end."""

    _open_ended = False

    async def send(self, message: ASGISendEvent) -> None:
        """As uvicorn's, which sends chunks to all."""
        if message["type"] == "http.response.start":
            if not any(name == b"content-length" for name, _ in message.get("headers", ())):
                self._open_ended, self.chunked_encoding = True, False
        elif self._open_ended and message["type"] == "http.response.body":
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A head that is too long (431), too slow (closed) or no HTTP (400) does not reach the app."""

    def __init__(self, config: BoundedConfig, server_state: ServerState) -> None:
        super().__init__(config, server_state, {})
        self._limits = config.limits

    crowded = False
    """It was accepted over limits.connections."""
    _head_bytes: int | None = None
    """An upper bound on the bytes of the head that is being read; None between heads."""
    _head_timer: asyncio.TimerHandle | None = None
    _aside_bytes = 0
    """Bytes since the last part of a body that are no body: the ends of chunks, and fields behind the last of them."""
    _ahead: list[RequestResponseCycle] | tuple[()] = ()
    """Requests that others were sent behind before they were answered (pipelining)."""
    _broken_off = False
    """The last response was sent; what still comes is not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """An idle connection is closed after a while, also before its first request."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the timers. All requests see that their client is gone; uvicorn shows it to the last."""
        for cycle in self._ahead:
            cycle.disconnected = True
            cycle.message_event.set()
        self._unset_keepalive_if_required()
        self._head_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bound the head by what was fed while it was open."""
        if self._broken_off:
            return
        before = self._head_bytes
        self._aside_bytes += len(data)
        self._parse(data)
        if self._broken_off:
            return
        if self._head_bytes is None:
            if self._aside_bytes > self._limits.header_bytes:
                self._break_off(headers_too_large(self._limits.header_bytes))
            return
        self._head_bytes = (before or 0) + len(data)
        if self._head_bytes > self._limits.header_bytes:
            self._break_off(headers_too_large(self._limits.header_bytes))
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _parse(self, data: bytes) -> None:
        """Feed the parser. An offer to change the protocol (`Upgrade`) is ignored, as HTTP allows: the head is parsed
        again without it. httptools takes no body behind such a head, and would read it as the next request.
        """
        self._unset_keepalive_if_required()
        before = 0 if self.cycle is None or self.cycle.response_complete else self._head_bytes
        rest: bytes | memoryview = data
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    return
                except httptools.HttpParserUpgrade as offer:
                    rest = memoryview(rest)[offer.args[0] :]
                if self.parser.get_method() == b"CONNECT":
                    self.send_400_response("CONNECT is not served")
                    return
                self._parse_without_offer()
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            if before is not None and before + len(data) > self._limits.header_bytes:  # the parser has a bound too
                self._break_off(headers_too_large(self._limits.header_bytes))
            else:
                self.send_400_response("Invalid HTTP request received.")

    def _parse_without_offer(self) -> None:
        """The head that was just read, without `Upgrade`, through a new parser, which then reads on."""
        head = [b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        head += [b"%s: %s\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # httptools before 0.6.3; as uvicorn sets it
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"".join(head) + b"\r\n")

    def on_message_begin(self) -> None:
        """A new head begins."""
        super().on_message_begin()
        self._head_bytes = self._aside_bytes = 0
        extensions: dict[str, object] = {
            ABORT: self.transport.abort,
            BUFFERED: self.transport.get_write_buffer_size,
        }
        if self.crowded and len(self.connections) > self._limits.connections:
            extensions[CROWDED] = True
        self.scope["extensions"] = extensions  # type: ignore[typeddict-item]

    def on_headers_complete(self) -> None:
        """The head is whole; one that offers another protocol is parsed again first."""
        if self.parser.should_upgrade():
            return
        self._head_read()
        self._aside_bytes = 0
        before = self.cycle
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _Unframed
        if before is not None and not before.response_complete:
            self._ahead = [cycle for cycle in (*self._ahead, before) if not cycle.response_complete]
            if len(self.pipeline) < _PIPELINED:
                self.flow.resume_reading()
        self.headers = []  # fields behind the body are not the request's

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._aside_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self.parser.should_upgrade():
            return
        self._aside_bytes = 0
        super().on_message_complete()

    @property
    def idle_since_s(self) -> float | None:
        """When it began to wait for a request, or for the rest of a head, on the loop's clock; None: it does not, or a
        request before it is not answered yet.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        for timer, allowed_s in ((self.timeout_keep_alive_task, self.timeout_keep_alive), (self._head_timer, HEAD_S)):
            if timer is not None and not self._broken_off:
                return timer.when() - allowed_s
        return None

    def close_idle(self) -> None:
        """Close it, for a new client; it counts no more."""
        self.connections.discard(self)
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, without waiting for a client that does not take what it was sent."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._break_off(ApiError(400, msg))

    def _head_read(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _break_off(self, error: ApiError) -> None:
        self._head_read()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or self.pipeline or not cycle.more_body:
                # The answer to an earlier request is on its way; another in its midst would be garbage.
                self.transport.abort()
                return
            # The body of this request is broken: the application hears that its client is gone.
            cycle.disconnected = True
            cycle.message_event.set()
        head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\ncontent-length: {len(error.body)}\r\n"
        head += f"x-request-id: {uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + error.body)
        # Closing with bytes unread would reset the connection, and the client might never see why.
        self._broken_off = True
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(LINGER_S, self.transport.abort)
