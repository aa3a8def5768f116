"""Every error as a client sees it: a status, a few headers, and OpenAI's body. Nothing of the inside gets out."""

from __future__ import annotations

import json

from throttllem.engines.base import EngineError
from throttllem.gateway.control.rejections import RejectedError

INVALID = "invalid_request_error"
"""OpenAI's name for everything that the client did wrong."""
SERVER = "server_error"

ByteHeaders = tuple[tuple[bytes, bytes], ...]


class HttpError(Exception):
    """An answer that is an error. `kind` and `code` are the body's `type` and `code`; `param` names what was wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: ByteHeaders = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> bytes:
        """OpenAI's error object as JSON."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, separators=(",", ":")).encode()


def invalid(message: str, param: str | None = None) -> HttpError:
    """400: the request itself is wrong, and where."""
    return HttpError(400, message, param=param)


def too_large(most_bytes: int) -> HttpError:
    """413: the body is over the limit."""
    return HttpError(413, f"the request's body is over the limit of {most_bytes} bytes", code="body_too_large")


def headers_too_large(most_bytes: int) -> HttpError:
    """431: the head is over the limit."""
    return HttpError(431, f"the request's headers are over the limit of {most_bytes} bytes", code="headers_too_large")


def not_found(method: str, path: str) -> HttpError:
    """404: there is nothing at this path."""
    return HttpError(404, f"Invalid URL ({method} {path})", code="unknown_url")


def not_allowed(method: str, path: str, allow: str) -> HttpError:
    """405: the path exists, but not for this method."""
    return HttpError(405, f"Not allowed: {method} {path}; use {allow}", headers=((b"allow", allow.encode()),))


def unavailable(message: str, *, code: str, retry_after_s: int) -> HttpError:
    """503: not now; the connection is closed so that the client comes back by a new one."""
    headers = ((b"retry-after", str(retry_after_s).encode()), (b"connection", b"close"))
    return HttpError(503, message, kind=SERVER, code=code, headers=headers)


def detail(error: Exception) -> str:
    """An error in words for the log."""
    if isinstance(error, RejectedError) and error.detail:
        return f"{error}: {error.detail}"
    return str(error)


def as_http(error: Exception) -> HttpError:
    """Any error as a client may see it; what is not meant for clients becomes a 500 that tells nothing."""
    match error:
        case HttpError():
            return error
        case RejectedError():
            retry = error.retry_after_s
            headers = () if retry is None else ((b"retry-after", str(retry).encode()),)
            return HttpError(error.status, str(error), kind=error.kind, code=error.code, headers=headers)
        case EngineError():
            return HttpError(error.status, error.told, kind="engine_error", code="engine_error")
        case _:
            return HttpError(500, "the gateway failed to serve this request", kind=SERVER, code="internal_error")
