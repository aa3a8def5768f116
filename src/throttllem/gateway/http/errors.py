"""The errors of HTTP itself: too large, not found, not allowed, not now. Those of a request's content are elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from throttllem.engines.http import OURS
from throttllem.openai_api.errors import ApiError, invalid

_ONCE = frozenset({"host", "origin", "authorization", "x-api-key", "content-type", "content-encoding"})
"""Fields that decide something, and of which an engine might take another one than the gateway."""


def too_large(most_bytes: int) -> ApiError:
    """413: the body is over the limit."""
    return ApiError(413, f"the request's body is over the limit of {most_bytes} bytes", code="body_too_large")


def headers_too_large(most_bytes: int) -> ApiError:
    """431: the head is over the limit."""
    return ApiError(431, f"the request's headers are over the limit of {most_bytes} bytes", code="headers_too_large")


def not_found(method: str, path: str) -> ApiError:
    """404: there is nothing at this path."""
    return ApiError(404, f"Invalid URL ({method} {path})", code="unknown_url")


def moved(target: str) -> ApiError:
    """307: the same thing is there without the slash at its end."""
    return ApiError(307, f"use {target}", headers=((b"location", target.encode("latin-1")),))


def check_framing(version: str, transfer_encoding: str | None) -> None:
    """Raises ApiError for a request of which another server might see another end: 505, 400."""
    closing = ((b"connection", b"close"),)
    if version not in ("1.1", "1.0"):
        raise ApiError(505, f"HTTP/{version} is not served; use HTTP/1.1", headers=closing)
    if transfer_encoding is not None and (transfer_encoding.strip().lower() != "chunked" or version == "1.0"):
        raise ApiError(400, "transfer-encoding: must be chunked, and in HTTP/1.1", headers=closing)


def not_allowed(method: str, path: str, allow: str) -> ApiError:
    """405: the path exists, but not for this method."""
    return ApiError(405, f"Not allowed: {method} {path}; use {allow}", headers=((b"allow", allow.encode()),))


def unavailable(message: str, *, code: str, retry_after_s: int) -> ApiError:
    """503: not now; the connection is closed, so that the client retries on a new one."""
    headers = ((b"connection", b"close"),)
    return ApiError(503, message, code=code, retry_after_s=retry_after_s, headers=headers)


def check_repeated(fields: Iterable[tuple[str, str]]) -> None:
    """Raises ApiError 400 for a request that has a field twice of which one only can hold."""
    seen: set[str] = set()
    for name, _ in fields:
        if name in seen and (name in _ONCE or name.startswith(OURS)):
            raise invalid(f"{name[:80]}: the header is there twice; send it once", name[:80])
        seen.add(name)
