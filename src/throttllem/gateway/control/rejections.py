"""The core's reasons, and the control loop's own, as errors for clients: status, type, code, and what to do."""

from __future__ import annotations

from throttllem.core.types import EngineSpec, Reason, Request
from throttllem.engines.base import EngineError
from throttllem.openai_api.errors import ApiError, invalid

MODEL_CHARACTERS = 80
"""The most of an unknown model's name that an error repeats."""
ENGINE_ERROR = "engine_error"
RATE_LIMIT_ERROR = "rate_limit_error"


def rejected(why: Reason, request: Request, spec: EngineSpec | None, retry_after_s: int) -> ApiError:
    """Why the core did not serve a request, or not to its end. `spec`: the engine, if known."""
    tokens = request.prompt_tokens + request.max_tokens
    size = f"prompt {request.prompt_tokens} + max_tokens {request.max_tokens} = {tokens} tokens"
    match why:
        case Reason.NEVER_FITS_CONTEXT:
            limit = f"; the model's context holds {spec.max_context_tokens}" if spec else ""
            return _too_long(f"{size}{limit}: shorten the prompt or lower max_tokens")
        case Reason.NEVER_FITS_KV:
            limit = f"; the engine's KV cache holds {spec.kv_blocks * spec.block_tokens}" if spec else ""
            each = f" for each of {request.sequences} answers" if request.sequences > 1 else ""
            return _too_long(f"{size}{each}{limit}: shorten the prompt, lower max_tokens or ask for fewer answers")
        case Reason.QUEUE_FULL:
            return queue_full(retry_after_s)
        case Reason.ENGINE_LOST:
            message = "the engine was lost while it ran this request"
            return ApiError(502, message, kind=ENGINE_ERROR, code=why.name.lower())
        case Reason.BATCH:
            message = f"{request.sequences} answers side by side; the engine runs fewer: ask for fewer at a time"
            return invalid(message, code="too_many_sequences")
        case _:
            message = f"its SLO cannot be met now: {why.value}"
            return ApiError(429, message, kind=RATE_LIMIT_ERROR, code="slo_unmeetable", retry_after_s=retry_after_s)


def queue_full(retry_after_s: int) -> ApiError:
    """429: `admission.queue_limit` requests wait already."""
    message = "the queue is full: try again later"
    return ApiError(429, message, kind=RATE_LIMIT_ERROR, code="queue_full", retry_after_s=retry_after_s)


def queue_timeout(seconds: float, retry_after_s: int) -> ApiError:
    """503: the request was not dispatched within limits.queue_wait_s."""
    message = f"no place in the engine was found within {seconds:g} s (limits.queue_wait_s)"
    return ApiError(503, message, kind=ENGINE_ERROR, code="queue_timeout", retry_after_s=retry_after_s)


def no_engine(trouble: str | None, retry_after_s: int = 5) -> ApiError:
    """503: no engine can serve; `trouble`, an engine's address included, is for the log."""
    message = "no engine is up"
    detail = f"{message}: {trouble}" if trouble else None
    return ApiError(503, message, kind=ENGINE_ERROR, code="no_engine", retry_after_s=retry_after_s, detail=detail)


def engine_failed(error: EngineError) -> ApiError:
    """502 to 504: the engine failed before the request was dispatched to it."""
    return ApiError(error.status, error.message, kind=ENGINE_ERROR, code="engine_failed", detail=str(error))


def engine_silent(seconds: float) -> ApiError:
    """504: the engine holds the request and sends nothing."""
    message = f"the engine gave nothing for {seconds:g} s (limits.silence_s)"
    return ApiError(504, message, kind=ENGINE_ERROR, code="engine_silent")


def request_lost(seconds: float) -> ApiError:
    """504: the engine works, but no longer on this request."""
    message = f"the engine no longer holds this request, and gave nothing for {seconds:g} s (limits.silence_s)"
    return ApiError(504, message, kind=ENGINE_ERROR, code="request_lost")


def request_stalled(seconds: float) -> ApiError:
    """504: the engine gave no token of this request, whatever else it does."""
    message = f"the engine gave no token of this request for {seconds:g} s (limits.request_s)"
    return ApiError(504, message, kind=ENGINE_ERROR, code="request_stalled")


def draining() -> ApiError:
    """503: the gateway shuts down."""
    return ApiError(503, "the gateway is shutting down", kind=ENGINE_ERROR, code="draining", retry_after_s=5)


def unknown_model(name: str, known: tuple[str, ...]) -> ApiError:
    """404: no engine serves a model of that name."""
    listed = ", ".join(known) or "none yet"
    message = f"the model {name[:MODEL_CHARACTERS]!r} does not exist; there is: {listed}"
    return ApiError(404, message, code="model_not_found")


def no_model_named(known: tuple[str, ...]) -> ApiError:
    """400: the request names no model, and there are several."""
    return invalid(f"model: must be the name of a model; there is: {', '.join(known) or 'none yet'}", "model")


def _too_long(message: str) -> ApiError:
    return invalid(message, code="context_length_exceeded")
