"""Errors of OpenAI's API: a status, a few headers, and the JSON body `{"error": {...}}`.

The one class that a client's error is made from, in the gateway and in the engines that speak this API themselves.
"""

from __future__ import annotations

import json

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
"""Values of the body's `type`: the client's fault, and this side's."""
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""`type` of an error of Anthropic's API; other statuses: invalid_request_error, and api_error from 500."""

ByteHeaders = tuple[tuple[bytes, bytes], ...]


class ApiError(Exception):
    """A request that is not served, or not to its end.

    `message` is what the client reads; `kind`, `param` and `code` are the body's `type`, `param` (the field at fault)
    and `code`. `retry_after_s` becomes a header beside `headers`. `detail` replaces the message in logs (`str`) where
    that names what a client must not see, as an engine's address.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: ByteHeaders = (),
        detail: str | None = None,
    ) -> None:
        super().__init__(detail or message)
        self.status = status
        self.message = message
        self.kind = kind or (INVALID_REQUEST if status < 500 else SERVER_ERROR)
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        retry = () if retry_after_s is None else ((b"retry-after", str(retry_after_s).encode()),)
        self.headers = retry + headers

    @property
    def body(self) -> bytes:
        """The response's body."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, separators=(",", ":")).encode()


def error_body(error: ApiError, path: str) -> bytes:
    """The body of an error as the API of this path shapes it."""
    if not path.startswith(MESSAGES):
        return error.body
    kind = _ANTHROPIC_TYPES.get(error.status, INVALID_REQUEST if error.status < 500 else "api_error")
    shaped = {"type": "error", "error": {"type": kind, "message": error.message}}
    return json.dumps(shaped, separators=(",", ":")).encode()


def error_event(error: ApiError, path: str) -> bytes:
    """The event that ends a stream of the API of this path which has begun."""
    typed = b"event: error\n" if path.startswith((MESSAGES, RESPONSES)) else b""
    return typed + b"data: " + error_body(error, path) + b"\n\n"


def invalid(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    """400: the request is wrong; `param` names the field."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """500: a fault of this program; the client learns nothing about it, the log has the traceback."""
    return ApiError(500, "the gateway failed to serve this request", code="internal_error")


def as_api_error(error: Exception) -> ApiError:
    """The error as a client may see it: any exception that is not an ApiError is an internal error."""
    return error if isinstance(error, ApiError) else internal_error()
