"""An engine's reply on its way to the client: bytes as they come, tokens counted as they pass, the ticket finished.

Nothing is held back, but for one event (or a body that is not streamed) where the client asked for `metrics`.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict

import pydantic_core

from throttllem.engines.base import EngineError, Headers, Reply
from throttllem.engines.http import passed_on
from throttllem.engines.sse import Splitter, is_whole
from throttllem.gateway.control.ticket import Receipt, Ticket
from throttllem.gateway.http.errors import ByteHeaders
from throttllem.gateway.http.exchange import Exchange
from throttllem.gateway.http.token_events import Meter

_OWN = frozenset({"x-request-id"})
_LENGTH = frozenset({"content-length"})


async def relay(
    exchange: Exchange,
    reply: Reply,
    ticket: Ticket,
    *,
    stream: bool,
    native: bool = False,
    metrics: bool,
    held_bytes: int,
) -> None:
    """The reply of a controlled request. An engine's error passes as it is and leaves the ticket unfinished.

    `native`: the request came by Triton's own API.

    Raises EngineError, also for an error that the engine has told the client itself by then.
    """
    if reply.status >= 300:
        await forward(exchange, reply)
        if reply.status >= 500:
            raise EngineError(f"the engine answered {reply.status}", told=f"the engine answered {reply.status}")
    elif _is_stream(reply.headers):
        meter = Meter(native=native)
        await _events(exchange, reply, ticket, meter, counted=stream, metrics=metrics)
        if meter.failed:
            raise EngineError("the engine told an error in its stream")
    else:
        await _whole(exchange, reply, ticket, metrics=metrics, held_bytes=held_bytes)


async def forward(exchange: Exchange, reply: Reply, silence_s: float | None = None) -> None:
    """A reply that is nobody's business. Raises EngineError 504 if the engine is silent for `silence_s`."""
    await exchange.start(_status(reply), _headers(reply.headers), events=_is_stream(reply.headers))
    while chunk := await _next(reply, silence_s):
        await exchange.write(chunk)
    await exchange.finish()


async def _events(
    exchange: Exchange, reply: Reply, ticket: Ticket, meter: Meter, *, counted: bool, metrics: bool
) -> None:
    held = _Held() if metrics else None
    receipt: Receipt | None = None
    await exchange.start(_status(reply), _headers(reply.headers, _LENGTH), events=True)
    try:
        while chunk := await reply.read():
            count = meter.feed(chunk)
            ending = meter.done and receipt is None and not meter.failed
            at_once = held is None and not ending
            if at_once:
                await exchange.write(chunk)  # the client first: what its tokens mean for others can wait
            if count and counted:
                ticket.tokens(count)
            if ending:
                receipt = ticket.finish(meter.used)  # before a slow client has taken the last of it
            if not at_once and (ready := chunk if held is None else held.feed(chunk, receipt)):
                await exchange.write(ready)
    except EngineError:
        if receipt is None:  # after [DONE] the answer is whole, whatever becomes of its connection
            raise
    if (count := meter.close()) and counted:
        ticket.tokens(count)
    cut_off = receipt is None and not meter.failed and not meter.whole
    if receipt is None and not meter.failed and not cut_off:
        receipt = ticket.finish(meter.used)
    await _end(exchange, b"" if held is None else held.close(receipt), cut_off=cut_off)


async def _end(exchange: Exchange, rest: bytes, *, cut_off: bool) -> None:
    """The last bytes of a stream. Raises EngineError if it ended before its answer did."""
    if not cut_off:
        return await exchange.finish(rest)
    if rest:
        await exchange.write(rest)
    raise EngineError("the engine's stream ended before its answer did", told="the engine broke off")


async def _whole(exchange: Exchange, reply: Reply, ticket: Ticket, *, metrics: bool, held_bytes: int) -> None:
    """A body that is not streamed: held until it is whole, so that an engine that dies is told as an error."""
    parts: list[bytes] = []
    size = 0
    while chunk := await reply.read():
        parts.append(chunk)
        size += len(chunk)
        if size > held_bytes:
            return await _unheld(exchange, reply, ticket, b"".join(parts))
    body = b"".join(parts)
    fields = _object(body)
    receipt = ticket.finish(_used(fields))
    if metrics and fields is not None:
        body = json.dumps(_with_metrics(fields, receipt), separators=(",", ":")).encode()
    length = ((b"content-length", str(len(body)).encode()),)
    await exchange.start(_status(reply), _headers(reply.headers, _LENGTH) + length)
    await exchange.finish(body)


async def _unheld(exchange: Exchange, reply: Reply, ticket: Ticket, begun: bytes) -> None:
    """A body too long to be held, of which `begun` is the front: it passes as it comes, and is not read."""
    await exchange.start(_status(reply), _headers(reply.headers))
    await exchange.write(begun)
    while chunk := await reply.read():
        await exchange.write(chunk)
    ticket.finish()
    await exchange.finish()


class _Held:
    """Keeps the last event that holds data back until it is known whether another follows."""

    def __init__(self) -> None:
        self._events = Splitter()
        self._kept: list[bytes] = []

    def feed(self, chunk: bytes, receipt: Receipt | None) -> bytes:
        """What may go now; with a receipt, everything that is whole, the metrics in the last event of data."""
        ready: list[bytes] = []
        for event in self._events.feed(chunk):
            done = event.startswith((b"data: [DONE]", b"data:[DONE]"))
            if not is_whole(event):
                ready += [*self._kept, event]
                self._kept = []
            elif event.startswith(b"data:") and not done:
                ready += self._kept
                self._kept = [event]
            elif done:
                ready += [*self._patched(receipt), event]
                self._kept = []
            else:
                (self._kept if self._kept else ready).append(event)
        return b"".join(ready)

    def close(self, receipt: Receipt | None) -> bytes:
        """The rest, at the end of the stream."""
        kept, self._kept = self._patched(receipt), []
        return b"".join([*kept, self._events.rest()])

    def _patched(self, receipt: Receipt | None) -> list[bytes]:
        if not self._kept or receipt is None:
            return self._kept
        payload = self._kept[0].removeprefix(b"data:")
        fields = _object(payload)
        if fields is None:
            return self._kept
        blank = payload[len(payload.rstrip(b"\r\n")) :]
        patched = json.dumps(_with_metrics(fields, receipt), separators=(",", ":")).encode()
        return [b"data: " + patched + blank, *self._kept[1:]]


async def _next(reply: Reply, silence_s: float | None) -> bytes:
    """The next bytes, b"" at the end."""
    try:
        async with asyncio.timeout(silence_s):
            return await reply.read()
    except TimeoutError as error:
        raise silent(silence_s or 0.0) from error


def silent(seconds: float) -> EngineError:
    """The engine gave nothing for so long."""
    said = f"the engine gave nothing for {seconds:g} s (limits.silence_s)"
    return EngineError(said, status=504, told=said)


def _with_metrics(fields: dict[str, object], receipt: Receipt) -> dict[str, object]:
    told = {name: value for name, value in asdict(receipt).items() if value is not None}
    there = fields.get("metrics")
    return fields | {"metrics": (there if isinstance(there, dict) else {}) | told}


def _object(body: bytes) -> dict[str, object] | None:
    try:
        fields = pydantic_core.from_json(body)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _used(fields: dict[str, object] | None) -> int | None:
    usage = fields.get("usage") if fields is not None else None
    used = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return used if isinstance(used, int) and not isinstance(used, bool) and used >= 0 else None


def _is_stream(headers: Headers) -> bool:
    return any(name == "content-type" and value.lower().startswith("text/event-stream") for name, value in headers)


def _status(reply: Reply) -> int:
    if not 200 <= reply.status <= 599:
        raise EngineError(f"the engine answers with status {reply.status}")
    return reply.status


def _headers(headers: Headers, dropped: frozenset[str] = frozenset()) -> ByteHeaders:
    """An engine's headers as the client gets them."""
    kept = ((name, value) for name, value in passed_on(headers) if name not in dropped and name not in _OWN)
    return tuple((name.encode("latin-1"), value.encode("latin-1")) for name, value in kept)
