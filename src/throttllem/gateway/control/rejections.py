"""The core's reasons as a client hears them: status, OpenAI's error type and code, and what to do about it."""

from __future__ import annotations

from throttllem.core.types import EngineSpec, Reason, Request
from throttllem.engines.base import EngineError

MODEL_SHOWN = 80
"""So many characters of a model's name that does not exist are told back."""


class RejectedError(Exception):
    """A request that is not served (further). `status`, `kind`, `code` as in OpenAI; `retry_after_s` for 429, 503.

    `detail` is for the log; no client sees it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str,
        code: str | None = None,
        retry_after_s: int | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.retry_after_s = retry_after_s
        self.detail = detail


def refused(why: Reason, request: Request, spec: EngineSpec | None, retry_after_s: int) -> RejectedError:
    """Why a request was not served, or not to its end."""
    asked = f"prompt {request.prompt_tokens} + max_tokens {request.max_tokens} = {total(request)} tokens"
    match why:
        case Reason.NEVER_FITS_CONTEXT:
            limit = f"; the model's context holds {spec.max_context_tokens}" if spec else ""
            return _too_long(f"{asked}{limit}: shorten the prompt or lower max_tokens")
        case Reason.NEVER_FITS_KV:
            held = f"; the engine's KV cache holds {spec.kv_blocks * spec.block_tokens}" if spec else ""
            each = f" for each of {request.sequences} answers" if request.sequences > 1 else ""
            return _too_long(f"{asked}{each}{held}: shorten the prompt, lower max_tokens or ask for fewer answers")
        case Reason.QUEUE_FULL:
            return queue_full(retry_after_s)
        case Reason.ENGINE_LOST:
            return RejectedError(
                502, "the engine was lost while it ran this request", kind="engine_error", code=why.name.lower()
            )
        case Reason.BATCH:
            return RejectedError(
                400,
                f"{request.sequences} answers side by side; the engine runs fewer: ask for fewer at a time",
                kind="invalid_request_error",
                code="too_many_sequences",
            )
        case _:
            return RejectedError(
                429,
                f"its promise cannot be kept now: {why.value}",
                kind="rate_limit_error",
                code="slo_unmeetable",
                retry_after_s=retry_after_s,
            )


def queue_full(retry_after_s: int) -> RejectedError:
    """More wait than may wait."""
    return RejectedError(
        429,
        "the queue is full: try again later",
        kind="rate_limit_error",
        code="queue_full",
        retry_after_s=retry_after_s,
    )


def engine_failed(error: EngineError) -> RejectedError:
    """The engine failed before the request was dispatched to it."""
    return RejectedError(error.status, error.told, kind="engine_error", code="engine_failed", detail=str(error))


def broken() -> RejectedError:
    """The gateway itself failed at this request; what happened is in its log."""
    return RejectedError(500, "the gateway failed to serve this request", kind="server_error", code="internal_error")


def waited_too_long(seconds: float, retry_after_s: int) -> RejectedError:
    """No place was found within limits.queue_wait_s."""
    return RejectedError(
        503,
        f"no place in the engine was found within {seconds:g} s (limits.queue_wait_s)",
        kind="engine_error",
        code="queue_timeout",
        retry_after_s=retry_after_s,
    )


def no_engine(trouble: str | None, retry_after_s: int = 5) -> RejectedError:
    """Nothing is there that could serve; `trouble` is for the log."""
    return RejectedError(
        503, "no engine is up", kind="engine_error", code="no_engine", retry_after_s=retry_after_s, detail=trouble
    )


def silent(seconds: float) -> RejectedError:
    """The engine holds the request and gives nothing."""
    return RejectedError(
        504,
        f"the engine gave nothing for {seconds:g} s (limits.silence_s)",
        kind="engine_error",
        code="engine_silent",
    )


def draining() -> RejectedError:
    """The gateway shuts down."""
    return RejectedError(503, "the gateway is shutting down", kind="engine_error", code="draining", retry_after_s=5)


def unknown_model(name: str, known: tuple[str, ...]) -> RejectedError:
    """No engine serves a model of that name."""
    there = ", ".join(known) or "none yet"
    return RejectedError(
        404,
        f"the model {name[:MODEL_SHOWN]!r} does not exist; there is: {there}",
        kind="invalid_request_error",
        code="model_not_found",
    )


def total(request: Request) -> int:
    """Tokens that one sequence of a request may come to."""
    return request.prompt_tokens + request.max_tokens


def _too_long(message: str) -> RejectedError:
    return RejectedError(400, message, kind="invalid_request_error", code="context_length_exceeded")
