"""The OpenAPI 3.1 document of the gateway's HTTP API, built from the tables below. Served at `/openapi.json`.

`python -m throttllem.gateway.http.openapi` writes the copy in docs/reference/openapi.json. The document describes what
the gateway itself reads, adds and answers; the engine documents the rest of its bodies. Tests compare routes, headers
and error codes with the code that implements them. Knows nothing of how requests are served.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

from throttllem.gateway.control.session import Receipt
from throttllem.gateway.http.slo_headers import CLASS_HEADER, METRICS_HEADER, TARGETS
from throttllem.gateway.http.uncontrolled import ELSEWHERE
from throttllem.openai_api.errors import MESSAGES, RESPONSES
from throttllem.openai_api.requests import CHAT, COMPLETIONS
from throttllem.openai_api.usage import MOST_TOKENS

Json = dict[str, Any]

_SLO_TEXTS = {
    "ttft_s": "TTFT SLO, milliseconds: arrival of the complete request to its first token",
    "tbt_s": "TPOT SLO, milliseconds: mean time between the tokens of the answer, the first left out",
    "e2e_s": "E2E SLO, milliseconds: arrival to the last token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCase:
    """One kind of error that the gateway itself answers: status, `type` and `code` of the body (None: null)."""

    status: int
    kind: str
    code: str | None
    when: str


ERRORS = (
    ErrorCase(status=400, kind="invalid_request_error", code=None, when="malformed body or header; `param` names it"),
    ErrorCase(
        status=400,
        kind="invalid_request_error",
        code="context_length_exceeded",
        when="prompt + max_tokens can never fit the context or the KV cache",
    ),
    ErrorCase(
        status=400,
        kind="invalid_request_error",
        code="too_many_sequences",
        when="more answers side by side than the engine runs",
    ),
    ErrorCase(
        status=400,
        kind="invalid_request_error",
        code="method_not_allowed",
        when="a web page's preflight asks for a method that no path has",
    ),
    ErrorCase(status=401, kind="invalid_request_error", code="invalid_api_key", when="no API key, or an unknown one"),
    ErrorCase(
        status=403,
        kind="invalid_request_error",
        code="host_not_allowed",
        when="no API keys are set, and the host is not in server.allowed_hosts",
    ),
    ErrorCase(
        status=403,
        kind="invalid_request_error",
        code="origin_not_allowed",
        when="no API keys are set, and the web page is not in server.allowed_origins",
    ),
    ErrorCase(
        status=403,
        kind="permission_error",
        code="admin_key_needed",
        when="the request changes the engine for all clients, and server.admin_keys are not set",
    ),
    ErrorCase(status=404, kind="invalid_request_error", code="model_not_found", when="no engine serves this model"),
    ErrorCase(status=404, kind="invalid_request_error", code="unknown_url", when="no such path"),
    ErrorCase(status=405, kind="invalid_request_error", code=None, when="the path exists, but not for this method"),
    ErrorCase(status=408, kind="invalid_request_error", code=None, when="the body did not arrive in time"),
    ErrorCase(
        status=413, kind="invalid_request_error", code="body_too_large", when="the body is over limits.body_bytes"
    ),
    ErrorCase(
        status=415,
        kind="invalid_request_error",
        code="unsupported_encoding",
        when="content-encoding is neither gzip nor deflate",
    ),
    ErrorCase(status=429, kind="rate_limit_error", code="queue_full", when="the admission queue is full"),
    ErrorCase(
        status=429,
        kind="rate_limit_error",
        code="slo_unmeetable",
        when='the SLO cannot be met (admission.unmeetable = "reject")',
    ),
    ErrorCase(
        status=431,
        kind="invalid_request_error",
        code="headers_too_large",
        when="the headers are over limits.header_bytes",
    ),
    ErrorCase(status=500, kind="server_error", code="internal_error", when="a fault of the gateway"),
    ErrorCase(status=502, kind="engine_error", code="engine_lost", when="the engine was lost while it ran the request"),
    ErrorCase(status=502, kind="engine_error", code="engine_error", when="the engine failed or broke off"),
    ErrorCase(
        status=502, kind="engine_error", code="engine_failed", when="the engine could not count the prompt's tokens"
    ),
    ErrorCase(status=503, kind="engine_error", code="no_engine", when="no engine is up within limits.engine_wait_s"),
    ErrorCase(status=503, kind="engine_error", code="queue_timeout", when="no place within limits.queue_wait_s"),
    ErrorCase(
        status=503, kind="engine_error", code="draining", when="the gateway shuts down; `type` may be server_error"
    ),
    ErrorCase(status=503, kind="server_error", code="own_limit", when="no descriptor or port is left for an engine"),
    ErrorCase(status=503, kind="server_error", code="too_many_bytes", when="more than limits.held_bytes"),
    ErrorCase(status=503, kind="server_error", code="too_many_connections", when="more than limits.connections"),
    ErrorCase(
        status=504, kind="engine_error", code="engine_silent", when="the engine showed no life for limits.silence_s"
    ),
    ErrorCase(
        status=504,
        kind="engine_error",
        code="request_lost",
        when="the engine has not held the request for limits.silence_s",
    ),
    ErrorCase(status=504, kind="engine_error", code="request_stalled", when="no token of it for limits.request_s"),
    ErrorCase(status=504, kind="engine_error", code="engine_error", when="no connection or answer in time"),
    ErrorCase(
        status=504, kind="engine_error", code="engine_failed", when="the engine did not count the prompt in time"
    ),
)

_ANYWHERE = (401, 403, 431, 500, 503)
_BODY = (400, 408, 413, 415)
_CONTROLLED = (*_BODY, 404, 429, 502, 504)
_PASSED = (*_BODY, 404, 405, 502, 504)
_RETRY = (429, 503)


def document(api_version: str) -> Json:
    """The whole document. `api_version` is the gateway's."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "throttllem gateway",
            "version": api_version,
            "summary": "OpenAI-compatible gateway that serves at the least GPU energy that meets every latency SLO",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"key": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Required if server.api_keys are set; may be sent as x-api-key.",
                }
            },
            "parameters": _parameters(),
            "headers": {
                "x-request-id": {"schema": {"type": "string"}, "description": "the client's own, or a new one"},
                "retry-after": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"},
            },
            "schemas": _schemas(),
            "responses": {f"error{status}": _error_response(status) for status in sorted({e.status for e in ERRORS})},
        },
    }


def body(api_version: str) -> bytes:
    """The document as indented JSON."""
    return (json.dumps(document(api_version), indent=2, ensure_ascii=False) + "\n").encode()


def _paths() -> Json:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    rest = {"name": "path", "in": "path", "required": True, "schema": {"type": "string"}, "description": "any path"}
    model = {"$ref": "#/components/schemas/Model"}
    native = "Triton's own generation API, under control (Triton engines only)"
    native_path = "/v2/models/{name}"
    passed = "Passed on to an engine without control"
    return {
        COMPLETIONS: {"post": _controlled("Create a completion", "CompletionRequest")},
        CHAT: {"post": _controlled("Create a chat completion", "ChatRequest")},
        RESPONSES: {"post": _controlled("Create a response (OpenAI's Responses)", "ResponseRequest")},
        MESSAGES: {"post": _controlled("Create a message (Anthropic's Messages)", "MessageRequest")},
        f"{native_path}/generate": {"parameters": [name], "post": _controlled(native, "NativeRequest")},
        f"{native_path}/generate_stream": {"parameters": [name], "post": _controlled(native, "NativeRequest")},
        "/v1/models": {"get": _own("All models that are served", _list_of(model), ())},
        "/v1/models/{name}": {"parameters": [name], "get": _own("One model", model, (404,))},
        "/v1/{path}": {"parameters": [rest], **{m: _passed(passed) for m in ("get", "post", "delete")}},
        "/v2/{path}": {"parameters": [rest], "get": _passed(f"{passed}; reading only")},
        **{path: {"post": _passed(passed)} for path in ELSEWHERE},
        "/health": {"get": _health()},
        "/openapi.json": {"get": _own("This document", {"type": "object"}, ())},
        "/metrics": {
            "get": _own("Prometheus metrics (server.metrics_port: on that port)", {"type": "string"}, (), "text/plain")
        },
        "/dashboard": {"get": _own("The dashboard (likewise)", {"type": "string"}, (), "text/html")},
        "/dashboard/state": {"get": _own("What the dashboard draws (likewise)", {"type": "object"}, ())},
    }


def _controlled(summary: str, schema: str) -> Json:
    refs = [f"#/components/parameters/{name}" for name in (*TARGETS, CLASS_HEADER, METRICS_HEADER, "x-request-id")]
    answer = {"$ref": "#/components/schemas/Answer"}
    return {
        "summary": summary,
        "parameters": [{"$ref": ref} for ref in refs],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        },
        "responses": {
            "200": {
                "description": "the engine's answer, its bytes unchanged but for `metrics` where requested",
                "headers": _id_header(),
                "content": {
                    "application/json": {"schema": answer},
                    "text/event-stream": {},
                },
            },
            **_error_refs((*_CONTROLLED, *_ANYWHERE)),
        },
    }


def _passed(summary: str) -> Json:
    answer = {
        "description": "the engine's answer, its bytes unchanged",
        "headers": _id_header(),
        "content": {"*/*": {}},
    }
    return {"summary": summary, "responses": {"200": answer, **_error_refs((*_PASSED, *_ANYWHERE))}}


def _own(summary: str, schema: Json, errors: tuple[int, ...], media: str = "application/json") -> Json:
    answer = {"description": summary, "headers": _id_header(), "content": {media: {"schema": schema}}}
    return {"summary": summary, "responses": {"200": answer, **_error_refs((*errors, *_ANYWHERE))}}


def _health() -> Json:
    def answer(description: str) -> Json:
        schema = {"$ref": "#/components/schemas/Health"}
        return {
            "description": description,
            "headers": _id_header(),
            "content": {"application/json": {"schema": schema}},
        }

    return {
        "summary": "Whether requests are accepted",
        "security": [],
        "responses": {
            "200": answer("requests are accepted"),
            "503": answer("draining, or no engine is up"),
            **_error_refs((431, 500)),
        },
    }


def _parameters() -> Json:
    positive = {"type": "number", "exclusiveMinimum": 0}
    targets = ((header, _SLO_TEXTS[field]) for header, field in TARGETS.items())
    found = {name: _header(name, positive, text) for name, text in targets}
    found[CLASS_HEADER] = _header(
        CLASS_HEADER, {"type": "string"}, "a class of the configuration; single headers replace single SLOs of it"
    )
    found[METRICS_HEADER] = _header(
        METRICS_HEADER, {"const": "1"}, "1: the answer, or the last chunk of its stream, carries `metrics`"
    )
    found["x-request-id"] = _header(
        "x-request-id", {"type": "string", "pattern": "^[!-~]{1,128}$"}, "comes back, and is passed to the engine"
    )
    return found


def _header(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": description}


def _schemas() -> Json:
    count = {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}
    token = {"type": "integer", "minimum": 0, "maximum": MOST_TOKENS}
    flag = {"type": "boolean"}
    own = {"type": "object", "properties": {"metrics": flag}, "additionalProperties": False}
    shared = {"model": {"type": "string", "minLength": 1}, "max_tokens": count, "n": count, "stream": flag}
    text_or_ids = [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": token, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": token, "minItems": 1}, "minItems": 1},
    ]
    messages = {"type": "array", "items": {"type": "object"}, "minItems": 1}
    receipt = {
        field.name: {"type": "boolean" if field.name.endswith("_estimated") else "number"} for field in fields(Receipt)
    }
    error = {
        "message": {"type": "string"},
        "type": {"type": "string", "enum": sorted({case.kind for case in ERRORS})},
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
    named = ("type", "message")
    health = {
        "status": {"enum": ["ok", "degraded", "draining"]},
        "engines_up": {"type": "integer"},
        "engines": {"type": "integer"},
        "version": {"type": "string"},
    }
    return {
        "CompletionRequest": _object(
            shared
            | {"prompt": {"oneOf": text_or_ids}, "best_of": count, "user": {"type": "string"}, "throttllem": own},
            ("model", "prompt"),
        ),
        "ChatRequest": _object(
            shared
            | {"messages": messages, "max_completion_tokens": count, "user": {"type": "string"}, "throttllem": own},
            ("model", "messages"),
        ),
        "ResponseRequest": _object(
            {
                "model": shared["model"],
                "input": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
                "instructions": {"type": "string"},
                "max_output_tokens": count,
                "stream": flag,
                "throttllem": own,
            },
            (),
        ),
        "MessageRequest": _object(
            {"model": shared["model"], "messages": messages, "max_tokens": count, "stream": flag, "throttllem": own},
            ("messages", "max_tokens"),
        ),
        "NativeRequest": _object(
            {"text_input": {"type": "string"}, "max_tokens": count, "stream": flag}, ("text_input",)
        ),
        "Answer": _object({"metrics": {"$ref": "#/components/schemas/Metrics"}}, ()),
        "Metrics": _object(receipt, ()) | {"description": "what is not known is absent"},
        "Model": _object(
            {"id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"}}, ("id", "object")
        ),
        "Health": _object(health, tuple(health)),
        "Error": _object({"error": _object(error, tuple(error))}, ("error",)),
        "MessagesError": _object(
            {"type": {"const": "error"}, "error": _object({name: {"type": "string"} for name in named}, named)},
            ("type", "error"),
        )
        | {"description": f"on {MESSAGES} and the paths below it: Anthropic's shape"},
    }


def _object(properties: Json, required: tuple[str, ...]) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list_of(item: Json) -> Json:
    return _object({"object": {"const": "list"}, "data": {"type": "array", "items": item}}, ("object", "data"))


def _error_response(status: int) -> Json:
    cases = (case for case in ERRORS if case.status == status)
    text = "; ".join(f"{case.when} (`{case.code}`)" if case.code else case.when for case in cases)
    headers = _id_header()
    if status in _RETRY:
        headers["retry-after"] = {"$ref": "#/components/headers/retry-after"}
    shapes = [{"$ref": f"#/components/schemas/{name}"} for name in ("Error", "MessagesError")]
    content = {"application/json": {"schema": {"anyOf": shapes}}}
    return {"description": text, "headers": headers, "content": content}


def _error_refs(statuses: tuple[int, ...]) -> Json:
    return {str(status): {"$ref": f"#/components/responses/error{status}"} for status in sorted(set(statuses))}


def _id_header() -> Json:
    return {"x-request-id": {"$ref": "#/components/headers/x-request-id"}}


if __name__ == "__main__":
    sys.stdout.buffer.write(body(version("throttllem")))
