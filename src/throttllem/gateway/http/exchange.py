"""One HTTP request and its response: the body read within bounds, the response sent, and what may cut it short.

Knows ASGI, nothing of engines or SLOs. An exchange belongs to the task that serves it.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from email.utils import formatdate
from enum import StrEnum

from starlette.types import Message, Receive, Scope, Send

from throttllem.engines.http import OURS
from throttllem.gateway.bounds.held_bytes import HeldBytes
from throttllem.gateway.http.errors import too_large
from throttllem.openai_api.content_coding import DENSEST, LEAST_BYTES, accepts_gzip, coding_of, compressed, decoded
from throttllem.openai_api.errors import ApiError, ByteHeaders, error_body, error_event
from throttllem.openai_api.event_stream import is_whole

ABORT = "throttllem.abort"
"""The scope's extension that ends a connection without waiting for what its client has not taken."""
BUFFERED = "throttllem.buffered"
"""The scope's extension that returns the bytes which the client has not taken."""
_PIECE_BYTES = 256 * 1024
DISCARD_S = 1.0
"""How long an unwanted body is read on, so that its sender gets to see the response."""
_ROOM_S = 5.0
_ROOM_AGAIN_S = 0.02
_EVENTS: ByteHeaders = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
_KEEP_ALIVE = b": keep-alive\n\n"
_SANE_ID = re.compile(r"[!-~]{1,128}")


class Cause(StrEnum):
    """Why an exchange was cut short."""

    GONE = "the client is gone"
    SLOW = "the client takes or gives nothing"
    DRAINED = "the gateway is shutting down"


class GoneError(Exception):
    """The client left before its request was whole."""


class Exchange:
    """`blocked`: the client is waited for; `moves` counts what it took or gave: together they show a slow client.

    `fields` are the request's header fields in order, `own` those meant for the gateway (`x-slo-...`), `head_bytes` the
    size of its head without the request line's words. `request_id` is the client's if it is sane, else a new one.
    `started`: the response has begun; `finished`: its last byte was handed over; `events`: it is an event stream that
    can still take an event; `last`: the last bytes written to it. `reading`: its body is being read, of which
    `received_bytes` came; `budget` counts what is held for it.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, budget: HeldBytes | None = None) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.fields: list[tuple[str, str]] = []
        self.own: dict[str, str] = {}
        self.head_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        request_id: str | None = None
        for raw_name, raw_value in scope["headers"]:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            self.fields.append((name, value))
            self.head_bytes += len(name) + len(value) + 4
            if name.startswith(OURS):
                self.own[name] = value
            elif name == "x-request-id" and request_id is None and _SANE_ID.fullmatch(value):
                request_id = value
        self.headers = dict(self.fields)
        self.request_id = request_id or os.urandom(16).hex()
        self.started = self.finished = self.events = self.blocked = False
        self.moves = 0
        self.status: int | None = None
        self.cause: Cause | None = None
        self.receive = receive
        self.send = send
        self.reading = False
        self.received_bytes = 0
        self._budget = budget
        self._held_bytes = 0
        self._client: str = (scope.get("client") or ("",))[0]
        self._unread = True
        self.last = b""
        self._task = asyncio.current_task()
        self._listener: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None

    # ---- the request -----------------------------------------------------------------------------------------

    async def read(self, most_bytes: int) -> bytes:
        """The whole body, decompressed. Raises ApiError 413 over the limit, 415 for a coding that is not accepted,
        GoneError if the client leaves.
        """
        coded = self.headers.get("content-encoding")
        coding = None if coded is None else coding_of(coded)
        announced = self.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > most_bytes:
            raise too_large(most_bytes)
        if announced.isdecimal():
            self.hold(int(announced))  # all of it now: of uploads that do not fit together, the first ones still fit
        first, body = b"", bytearray()
        self.reading = True
        while self._unread and len(body) <= most_bytes:
            self.blocked = True
            message = await self.receive()
            self.blocked = False
            self.moves += 1
            if message["type"] == "http.disconnect":
                raise GoneError
            self._unread = bool(message.get("more_body"))
            part = message.get("body", b"")
            self.received_bytes += len(part)
            try:
                if self.received_bytes > self._held_bytes:
                    self.hold(self.received_bytes)
            except ApiError:
                self.reading = False
                body = bytearray()  # the error is on its way for a while, and keeps this frame
                raise
            if not body and not self._unread:
                first = part  # most bodies come in one part
            else:
                body += part
        self.reading = False
        if self.received_bytes > most_bytes:
            body = bytearray()
            raise too_large(most_bytes)
        whole = first or bytes(body)
        return whole if coding is None or not whole else await self._decoded(whole, coding, most_bytes)

    def hold(self, count: int, granted: int = 0) -> None:
        """`count` bytes are held for this request from now on. Raises ApiError 503 if that is too much; `granted` bytes
        are only where the whole budget is used up.
        """
        if self._budget is not None:
            self._budget.change(self._client, self._held_bytes, count, granted)
            self._held_bytes = count

    async def hold_soon(self, count: int) -> None:
        """Hold `count` bytes as soon as the whole budget has room. Raises ApiError 503 if it has none for a while."""
        until_s = time.monotonic() + _ROOM_S
        while True:
            try:
                self.hold(count, granted=count)
                return
            except ApiError:
                if time.monotonic() > until_s:
                    raise
            await asyncio.sleep(_ROOM_AGAIN_S)

    async def _decoded(self, body: bytes, coding: str, most_bytes: int) -> bytes:
        """The body as the engine gets it, without the header. Room for the most that it can become is held before, of
        the eighth that large bodies cannot take; then as much as it became is asked for, as of any body.
        """
        if self._budget is not None:
            most = min(most_bytes, len(body) * DENSEST, self._budget.most_bytes // 8)
            await self.hold_soon(len(body) + most)
        plain = await decoded(body, coding, most_bytes)
        if plain is None:
            raise too_large(most_bytes)
        self.hold(len(body))
        self.hold(len(plain))
        self.fields = [field for field in self.fields if field[0] != "content-encoding"]
        return plain

    def attend(self) -> None:
        """From here on, a client that hangs up interrupts the task. Only after the body was read."""
        self._listener = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if not self.finished:
            self.cut(Cause.GONE)

    async def _discard(self) -> bool:
        """Read the rest of the body and forget it; False if it did not end in time."""
        if "expect" in self.headers or self.cause is Cause.SLOW:
            return False
        try:
            async with asyncio.timeout(DISCARD_S):
                while self._unread:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise GoneError
                    self._unread = bool(message.get("more_body"))
        except TimeoutError:
            self.blocked = False
        return not self._unread

    # ---- the response ----------------------------------------------------------------------------------------

    def keep_alive(self, every_s: float) -> None:
        """The response is to be an event stream: whenever it was silent for `every_s`, it gets a comment. If it has not
        begun by then it begins, with status 200; an error is an event from there on.
        """
        self._keeper = asyncio.create_task(self._keep_alive(every_s))

    def stop_keeping(self) -> None:
        """The response is to be no event stream after all."""
        if self._keeper is not None:
            self._keeper.cancel()

    async def _keep_alive(self, every_s: float) -> None:
        buffered = self.scope.get("extensions", {}).get(BUFFERED, int)
        seen = self.moves
        while not self.finished:
            await asyncio.sleep(every_s / 2)
            # Nothing of this waits: the client has taken all that was sent, so that no other part can come between.
            if self.moves == seen and not self.blocked and not buffered():
                if not self.started:
                    await self.start(200, _EVENTS, events=True)
                if self.events and (not self.last or is_whole(self.last)):
                    await self.send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})
            seen = self.moves

    async def start(self, status: int, headers: ByteHeaders, *, events: bool = False) -> None:
        """Status and headers, as they are but for the request's id; nothing if a stream was begun to keep it alive."""
        if self.started:
            return
        self.started = True
        self.events = events
        marked = [*headers, (b"x-request-id", self.request_id.encode())]
        self.status = status
        self.blocked = True
        await self.send({"type": "http.response.start", "status": status, "headers": marked})
        self.blocked = False
        self.moves += 1

    async def write(self, chunk: bytes) -> None:
        """A part of the body; waits while the client is behind."""
        self.last = chunk
        self.blocked = True
        await self.send({"type": "http.response.body", "body": chunk, "more_body": True})
        self.blocked = False
        self.moves += 1

    async def finish(self, chunk: bytes = b"") -> None:
        """The last part of the body."""
        self.finished = True
        self.blocked = True
        await self.send({"type": "http.response.body", "body": chunk, "more_body": False})
        self.blocked = False
        self.moves += 1

    async def answer(self, status: int, headers: ByteHeaders, body: bytes) -> None:
        """A whole response that the gateway makes."""
        whole = not self._unread or await self._discard()
        closing = () if whole else ((b"connection", b"close"),)
        await self.reply(status, (*headers, (b"date", formatdate(usegmt=True).encode()), *closing), body)

    async def reply(self, status: int, headers: ByteHeaders, body: bytes) -> None:
        """A whole response with its length, compressed where the client accepts it and it is long."""
        long = len(body) >= LEAST_BYTES
        if long and accepts_gzip(self.headers.get("accept-encoding")) and (shorter := await compressed(body, headers)):
            body, headers = shorter, (*headers, (b"content-encoding", b"gzip"), (b"vary", b"accept-encoding"))
        await self.start(status, (*headers, (b"content-length", str(len(body)).encode())))
        at = 0
        while len(body) - at > _PIECE_BYTES:  # what a slow client has not taken yet stays ours to count
            await self.write(body[at : at + _PIECE_BYTES])
            at += _PIECE_BYTES
        await self.finish(body[at:] if at else body)

    async def fail(self, error: ApiError) -> None:
        """Send an error in the way that is still open: as the response, as an event, or by breaking off."""
        self.hold(0)  # its body is forgotten, and the error may be on its way for a while
        if self.finished:
            return
        if not self.started:
            json = ((b"content-type", b"application/json"),)
            await self.answer(error.status, json + error.headers, error_body(error, self.scope["path"]))
        elif self.events:
            # An event that was broken off must not swallow this one.
            gap = b"" if not self.last or self.last.endswith(b"\n\n") else b"\n\n"
            await self.finish(gap + error_event(error, self.scope["path"]))
        else:
            await self.abort()

    async def abort(self) -> None:
        """Break the connection off."""
        self.finished = True
        abort = self.scope.get("extensions", {}).get(ABORT)
        if abort is not None:
            abort()
            # The server learns of it in its next round.
            await asyncio.sleep(0)

    async def put(self, message: Message) -> None:
        """Any ASGI message of an application that responds in place of the gateway."""
        if message["type"] == "http.response.start":
            await self.start(message["status"], tuple(message.get("headers", ())))
        elif message.get("more_body"):
            await self.write(message.get("body", b""))
        else:
            await self.finish(message.get("body", b""))

    # ---- its end ---------------------------------------------------------------------------------------------

    @property
    def untouched(self) -> bool:
        """Whether the client has got nothing of the output: at most the head, and comments that keep it alive."""
        return not (self.last or self.finished or self.blocked)

    def cut(self, cause: Cause) -> None:
        """Interrupt the task that serves this; it sees asyncio.CancelledError, and `cause`."""
        if self.cause is None and self._task is not None:
            self.cause = cause
            self._task.cancel()

    def resume(self) -> None:
        """After a cut: the task may await again."""
        self.blocked = False
        while self._task is not None and self._task.cancelling():
            self._task.uncancel()

    def release(self) -> None:
        """The task is done with it."""
        self._task = None
        self.hold(0)
        for task in (self._listener, self._keeper):
            if task is not None:
                task.cancel()
        self._listener = self._keeper = None
