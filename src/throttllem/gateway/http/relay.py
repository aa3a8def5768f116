"""An engine's reply on its way to the client: bytes as they come, tokens counted as they pass, the session finished.

Nothing is held back, except one event (or a body that is not streamed) where the client asked for `metrics`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable
from dataclasses import asdict, replace

import pydantic_core

from throttllem.core.types import Request
from throttllem.engines.base import EngineError, Reply
from throttllem.gateway.bounds.held_bytes import SMALL_BYTES
from throttllem.gateway.control.session import Receipt, Session
from throttllem.gateway.http.exchange import Exchange
from throttllem.openai_api.errors import ByteHeaders
from throttllem.openai_api.event_stream import Meter, Splitter, data_of, is_done, is_whole
from throttllem.openai_api.requests import Api
from throttllem.openai_api.typed_events import TypedMeter
from throttllem.openai_api.usage import NO_USAGE, Usage, choices_in, tokens_in, usage_in

_TYPED = frozenset({Api.RESPONSES, Api.MESSAGES})
_LINGER_S = 0.25
"""How long an engine may take to end a reply behind its [DONE]; then its connection is closed."""


def relay(
    exchange: Exchange,
    reply: Reply,
    session: Session,
    *,
    api: Api,
    echo: bool = False,
    metrics: bool,
    held_bytes: int,
) -> Awaitable[None]:
    """The reply of a controlled request. An engine's error passes as it is and leaves the session unfinished.

    `api`: what the request came by; `echo`: the answer begins with the prompt. Raises EngineError, also for an error
    that the engine has sent to the client itself by then.
    """
    if reply.status >= 300:
        return _error(exchange, reply, api)
    status, is_stream, headers = _head(reply)
    session.attended(exchange)
    is_coded = any(name == b"content-encoding" for name, _ in headers)
    if is_coded or not is_stream:
        if exchange.started:  # to keep the client's connection alive
            message = "the engine did not stream plain events"
            raise EngineError(message, message=message)
        exchange.stop_keeping()
    if is_stream and is_coded:
        return _unread(exchange, reply, session, [], status, headers)
    if is_stream:
        request, held = session.request, _Held() if metrics else None
        most_tokens = request.max_tokens * request.sequences
        if api in _TYPED:
            meter: Meter = TypedMeter(most_tokens=most_tokens)
        else:
            native = api is Api.NATIVE
            meter = Meter(native=native, sequences=request.sequences, most_tokens=most_tokens, echo=echo)
        return _events(exchange, reply, session, meter, held, status, headers)
    return _whole(exchange, reply, session, status, headers, metrics=metrics, held_bytes=held_bytes, echo=echo)


async def _error(exchange: Exchange, reply: Reply, api: Api) -> None:
    if exchange.started:
        body = await reply.body()
        fields = _object(body) or {"error": {"message": body.decode(errors="replace"), "code": reply.status}}
        typed = b"event: error\n" if api in _TYPED else b""
        await exchange.finish(typed + b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n")
    else:
        await forward(exchange, reply)
    if reply.status >= 500:
        raise EngineError(f"the engine answered {reply.status}", message=f"the engine answered {reply.status}")


async def _events(
    exchange: Exchange,
    reply: Reply,
    session: Session,
    meter: Meter,
    held: _Held | None,
    status: int,
    headers: ByteHeaders,
) -> None:
    """Every token of every stream passes the loop here. [DONE] ends it, whatever the engine does then."""
    await exchange.start(status, headers, events=True)
    read, feed, counted = reply.read, meter.feed, session.streams
    chunk = b""
    while not meter.done and (chunk := await read()):
        count = feed(chunk)
        if held is None and not meter.done:
            # The client first: what its tokens mean for other requests can wait. As `exchange.write` does it.
            exchange.last, exchange.blocked = chunk, True
            await exchange.send({"type": "http.response.body", "body": chunk, "more_body": True})
            exchange.blocked = False
            exchange.moves += 1
        if count and counted:
            session.tokens(count)
        else:
            session.received()
        if held is not None and not meter.done and (ready := held.feed(chunk)):
            await exchange.write(ready)
    if not meter.done and (count := meter.close()) and counted:
        session.tokens(count)
    whole = meter.done or meter.whole
    # The session first: a slow client may take the last bytes late.
    usage = meter.counted
    receipt = None
    if whole and not meter.failed:
        if usage.output_tokens is None:
            await session.read_counters()
        receipt = session.finish(usage.output_tokens, usage)
    rest = chunk[: len(chunk) - meter.surplus] if meter.done else b""
    if meter.done and not is_whole(rest):
        rest += b"\n\n"
    if held is not None:
        rest = held.feed(rest) + held.close(receipt)
    await _end(exchange, rest, cut_off=not whole and not meter.failed, failed=meter.failed)
    if meter.done:
        await _linger(reply)


async def _linger(reply: Reply) -> None:
    """Read on to the end of a reply that the client has, so that its connection can be used again."""
    with contextlib.suppress(TimeoutError, EngineError):
        async with asyncio.timeout(_LINGER_S):
            while await reply.read():
                pass


async def _end(exchange: Exchange, rest: bytes, *, cut_off: bool, failed: bool) -> None:
    """The last bytes of a stream. Raises EngineError if it ended before its output did, or reported an error."""
    if cut_off:
        if rest:
            await exchange.write(rest)
        raise EngineError("the engine's stream ended before its output did", message="the engine broke off")
    await exchange.finish(rest)
    if failed:
        raise EngineError("the engine reported an error in its stream")


async def forward(exchange: Exchange, reply: Reply, silence_s: float | None = None, *, works: bool = False) -> None:
    """A reply that passes as it is. Raises EngineError 504 if the engine sends nothing for `silence_s`, which is
    limits.request_s if it `works`.
    """
    status, is_stream, headers = _head(reply, drop_length=False)
    bounded = any(name == b"content-length" for name, _ in headers)
    await exchange.start(status, headers, events=is_stream and not bounded)
    while chunk := await _next(reply, silence_s, works):
        await exchange.write(chunk)
    await exchange.finish()


async def _whole(
    exchange: Exchange,
    reply: Reply,
    session: Session,
    status: int,
    headers: ByteHeaders,
    *,
    metrics: bool,
    held_bytes: int,
    echo: bool,
) -> None:
    """A body that is not streamed: held until it is whole, so that the client of an engine that dies gets an error.
    One that is too long to be held passes as it comes, and is not read.
    """
    parts: list[bytes] = []
    size = 0
    while chunk := await reply.read():
        session.received()
        parts.append(chunk)
        size += len(chunk)
        if size > SMALL_BYTES:
            exchange.hold(exchange.received_bytes + size, granted=exchange.received_bytes)
        if size > held_bytes:
            await _unread(exchange, reply, session, parts, status, _head(reply, drop_length=False)[2])
            return
    body = b"".join(parts)
    fields = _object(body)
    usage = _usage(fields, session.request, echo)
    receipt = session.finish(usage.output_tokens, usage)
    if metrics and fields is not None:
        body = json.dumps(_with_metrics(fields, receipt), separators=(",", ":")).encode()
    await exchange.reply(status, headers, body)


async def _unread(
    exchange: Exchange, reply: Reply, session: Session, parts: list[bytes], status: int, headers: ByteHeaders
) -> None:
    """A reply that passes as it comes: too long to be held, or an event stream that the engine compressed, though it
    was requested plain.
    """
    await exchange.start(status, headers)
    while chunk := b"".join(parts) or await reply.read():
        parts = []
        session.received()
        await exchange.write(chunk)
    session.finish()
    await exchange.finish()


class _Held:
    """Keeps the last event that holds data back until it is known whether another follows."""

    def __init__(self) -> None:
        self._events = Splitter()
        self._kept: list[bytes] = []

    def feed(self, chunk: bytes) -> bytes:
        """What may go now."""
        ready: list[bytes] = []
        for event in self._events.feed(chunk):
            if not is_whole(event):
                ready += [*self._kept, event]
                self._kept = []
            elif data_of(event) is not None and not is_done(event):
                ready += self._kept
                self._kept = [event]
            else:
                (self._kept if self._kept else ready).append(event)
        return b"".join(ready)

    def close(self, receipt: Receipt | None) -> bytes:
        """The rest, at the end of the stream; with a receipt, the metrics in the last event of data."""
        kept, self._kept = self._patched(receipt), []
        return b"".join([*kept, self._events.rest()])

    def _patched(self, receipt: Receipt | None) -> list[bytes]:
        if not self._kept or receipt is None:
            return self._kept
        head, _, payload = self._kept[0].partition(b"data:")  # a typed event names its type first
        fields = _object(payload)
        if fields is None:
            return self._kept
        blank = payload[len(payload.rstrip(b"\r\n")) :]
        patched = json.dumps(_with_metrics(fields, receipt), separators=(",", ":")).encode()
        return [head + b"data: " + patched + blank, *self._kept[1:]]


async def _next(reply: Reply, silence_s: float | None, works: bool) -> bytes:
    """The next bytes, b"" at the end."""
    try:
        async with asyncio.timeout(silence_s):
            return await reply.read()
    except TimeoutError as error:
        raise silent(silence_s or 0.0, works) from error


def silent(seconds: float, works: bool) -> EngineError:
    """The engine sent nothing for `seconds`; `works`: for a request that computes."""
    message = f"the engine gave nothing for {seconds:g} s (limits.{'request_s' if works else 'silence_s'})"
    return EngineError(message, status=504, message=message)


def _with_metrics(fields: dict[str, object], receipt: Receipt) -> dict[str, object]:
    given = {name: value for name, value in asdict(receipt).items() if value is not None}
    there = fields.get("metrics")
    return fields | {"metrics": (there if isinstance(there, dict) else {}) | given}


def _object(body: bytes) -> dict[str, object] | None:
    try:
        fields = pydantic_core.from_json(body)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _usage(fields: dict[str, object] | None, request: Request, echo: bool) -> Usage:
    """What the engine counted itself: in usage, else in the choices' ids or log probabilities; with `echo` the latter
    are the prompt's too.
    """
    if fields is None:
        return NO_USAGE
    usage = usage_in(fields.get("usage"), request.max_tokens * request.sequences)
    if usage.output_tokens is None:
        counts = [tokens_in(choice, echo=echo) for choice in choices_in(fields)]
        if counts and None not in counts:
            return replace(usage, output_tokens=sum(count for count in counts if count is not None))
    return usage


def _head(reply: Reply, *, drop_length: bool = True) -> tuple[int, bool, ByteHeaders]:
    """Status, whether the body is an event stream, and the headers as the client gets them."""
    if not 200 <= reply.status <= 599:
        raise EngineError(f"the engine answers with status {reply.status}")
    if 300 <= reply.status < 400 and reply.status != 304:
        # Its address is not the client's: a client that followed would go past the gateway, or nowhere.
        target = dict(reply.headers).get("location", "")
        raise EngineError(
            f"the engine redirects ({reply.status}) to {target!r}: set the url of the engine to where it serves",
            message="the engine redirects its clients",
        )
    is_stream, headers = False, []
    for name, value in reply.headers:
        if name == "content-type":
            is_stream = is_stream or value.lower().startswith("text/event-stream")
        if name != "x-request-id" and not (drop_length and name == "content-length"):
            headers.append((name.encode("latin-1"), value.encode("latin-1")))
    return reply.status, is_stream, tuple(headers)
