"""Content codings of HTTP: compressed bodies of requests read within bounds, replies compressed for clients.

gzip and deflate, which the standard library has. Decompressing and compressing release the interpreter's lock, so what
takes longer than a moment runs in a thread.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable

from throttllem.openai_api.errors import ApiError, invalid

ACCEPTED = "gzip, deflate"
LEAST_BYTES = 2048
"""Compressing a shorter reply saves no packet."""
_IN_THREAD_BYTES = 64 * 1024
DENSEST = 1030
"""Bytes that one compressed byte can become, at most."""
_WINDOWS = {"gzip": (zlib.MAX_WBITS | 16,), "deflate": (zlib.MAX_WBITS, -zlib.MAX_WBITS)}
"""By coding. Some clients send deflate without zlib's frame."""
_ALIASES = {"x-gzip": "gzip"}
_FASTEST = 1
_MOST_MEMBERS = 16
"""Of one gzip body. What is behind a member is copied, so that many small ones would take for ever."""


def coding_of(field: str | None) -> str | None:
    """The coding in a request's `Content-Encoding`; None: none. Raises ApiError 415 for one that is not accepted."""
    coding = (field or "").strip().lower()
    coding = _ALIASES.get(coding, coding)
    if coding in ("", "identity"):
        return None
    if coding not in _WINDOWS:
        message = f"content-encoding: {coding[:40]!r} is not accepted; send one of {ACCEPTED}, or the body as it is"
        headers = ((b"accept-encoding", ACCEPTED.encode()),)
        raise ApiError(415, message, param="content-encoding", code="unsupported_encoding", headers=headers)
    return coding


async def decoded(body: bytes, coding: str, most_bytes: int) -> bytes | None:
    """The body without its coding; None: over `most_bytes`, of which no more is made. Raises ApiError 400."""
    if min(most_bytes, len(body) * DENSEST) > _IN_THREAD_BYTES:
        return await asyncio.to_thread(_decoded, body, coding, most_bytes)
    return _decoded(body, coding, most_bytes)


def _decoded(body: bytes, coding: str, most_bytes: int) -> bytes | None:
    for window in _WINDOWS[coding]:
        try:
            return _inflated(body, window, most_bytes)
        except zlib.error as error:
            why = str(error)  # the error's frames hold the body, and this one would hold the error
    raise invalid(f"the body is not {coding}, as content-encoding has it: {why}", "content-encoding")


def _inflated(body: bytes, window: int, most_bytes: int) -> bytes | None:
    """gzip may have several members, one behind the other."""
    parts: list[bytes] = []
    size = 0
    while body or not parts:
        if len(parts) == _MOST_MEMBERS:
            raise zlib.error(f"it has more than {_MOST_MEMBERS} members")
        stream = zlib.decompressobj(window)
        parts.append(stream.decompress(body, most_bytes + 1 - size))
        size += len(parts[-1])
        if size > most_bytes:
            return None
        if not stream.eof:
            raise zlib.error("it ends before its end")
        body = stream.unused_data
    return b"".join(parts)


def accepts_gzip(field: str | None) -> bool:
    """Whether an `Accept-Encoding` names gzip, or anything, without refusing it (`q=0`)."""
    found = {}
    for item in (field or "").lower().split(","):
        name, _, weight = item.replace(" ", "").partition(";q=")
        found[name.strip()] = weight.strip("0.") != "" or not weight
    return found.get("gzip", found.get("x-gzip", found.get("*", False)))


async def compressed(body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """A reply's body as gzip; None: these headers say that it is compressed already, or is no text."""
    kind = b""
    for name, value in headers:
        if name == b"content-encoding":
            return None
        kind = value if name == b"content-type" else kind
    if not kind.startswith((b"application/json", b"text/")):
        return None
    if len(body) > _IN_THREAD_BYTES:
        return await asyncio.to_thread(_gzip, body)
    return _gzip(body)


def _gzip(body: bytes) -> bytes:
    stream = zlib.compressobj(_FASTEST, wbits=zlib.MAX_WBITS | 16)
    return stream.compress(body) + stream.flush()
