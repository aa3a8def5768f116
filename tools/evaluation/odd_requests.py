"""About 300 odd requests to an OpenAI-compatible server: every path, wrong types of every field, bounds, encodings."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tools.testbed.engines.vllm import MODEL

CHAT, PLAIN, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
_SAID = [{"role": "user", "content": "hi"}]
_FEW: dict[str, Any] = {"model": MODEL, "max_tokens": 3, "temperature": 0}
BODIES: dict[str, dict[str, Any]] = {
    PLAIN: _FEW | {"prompt": "def main("},
    CHAT: _FEW | {"messages": _SAID},
    RESPONSES: {"model": MODEL, "max_output_tokens": 3, "temperature": 0, "input": "hi"},
    MESSAGES: _FEW | {"messages": _SAID},
}
"""A plain request of each API."""

_COUNTS: tuple[Any, ...] = (0, 1, -1, 4.0, 4.5, "4", "x", True, [], {}, 10**9, 10**30)
_FLAGS: tuple[Any, ...] = (True, False, None, 1, 0, "true", "on", "maybe", 2, [])
_TEXTS: tuple[Any, ...] = ("", None, 5, [], {}, "\ud83d\ude00", "\x00", "a" * 9000)
_ANY: tuple[Any, ...] = (None, 0, "x", [], {}, True)
_PROMPTS: tuple[Any, ...] = (
    "",
    None,
    5,
    [],
    {},
    [1, 2, 3],
    [1.0, "2"],
    [-1],
    [10**9],
    ["a", "b"],
    [[1, 2], [3]],
    [[]],
    [["a"]],
    ["a", 1],
    "\x00",
)
_MESSAGES: tuple[Any, ...] = (
    None,
    "hi",
    [],
    {},
    [None],
    [{}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "nobody", "content": "x"}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user", "content": [{"type": "odd"}]}],
    [{"role": "system", "content": "x"}],
    [{"role": "assistant", "content": "x"}],
    [*_SAID, *_SAID],
)
_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd:
    """One request, as bytes; `name` says what is odd about it."""

    name: str
    path: str
    body: bytes | None = None
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = field(default=(("content-type", "application/json"),))


def requests() -> tuple[Odd, ...]:
    """All of them, each name once."""
    return tuple([*_fields(), *_shapes(), *_paths(), *_heads(), *_bodies()])


def _fields() -> Iterator[Odd]:
    """Each field with values of every kind."""
    values: dict[str, tuple[Any, ...]] = {
        "max_tokens": _COUNTS,
        "n": (0, 2, -1, "2", 2.0, 1000, None, "x"),
        "stream": _FLAGS,
        "model": ("", None, 5, "none", []),
        "logprobs": (0, 1, True, -1, "x", 100),
        "temperature": (-1, "0", "x"),
        "top_p": (0, 1.1, "0.5", None),
        "stop": ("a", ["a", "b"], 5, [5], None, "", []),
        "user": _ANY,
        "priority": (0, 5, "x"),
        "seed": (0, "x", None),
    }
    for path in (PLAIN, CHAT):
        own = {"prompt": _PROMPTS, "echo": _FLAGS, "best_of": (0, 2, "x"), "suffix": _ANY} if path == PLAIN else {}
        talk = {"messages": _MESSAGES, "max_completion_tokens": _COUNTS} if path == CHAT else {}
        for name, tried in (values | own | talk).items():
            for value in tried:
                yield _sent(path, f"{name} = {_short(value)}", **{name: value})
    for name, tried in {
        "input": ("", None, 5, [], {}, _SAID, [{}]),
        "max_output_tokens": _COUNTS[:9],
        "stream": _FLAGS[:6],
        "instructions": ("be brief", None, 5),
        "store": (True, False, None),
        "previous_response_id": ("resp_none",),
    }.items():
        for value in tried:
            yield _sent(RESPONSES, f"{name} = {_short(value)}", **{name: value})
    for name, tried in {
        "messages": _MESSAGES[:9],
        "max_tokens": _COUNTS[:9],
        "stream": _FLAGS[:6],
        "system": ("be brief", None, 5, []),
    }.items():
        for value in tried:
            yield _sent(MESSAGES, f"{name} = {_short(value)}", **{name: value})


def _shapes() -> Iterator[Odd]:
    """Fields together, and features."""
    yield _sent(PLAIN, "max_tokens 0 with echo", max_tokens=0, echo=True, prompt="a b c")
    yield _sent(PLAIN, "max_tokens 0 with echo and logprobs", max_tokens=0, echo=True, logprobs=1)
    yield _sent(PLAIN, "stream with usage", stream=True, stream_options={"include_usage": True})
    yield _sent(PLAIN, "stream with usage on every chunk", stream=True, stream_options={"continuous_usage_stats": True})
    yield _sent(PLAIN, "stream_options without stream", stream_options={"include_usage": True})
    yield _sent(PLAIN, "token ids", return_token_ids=True, stream=True)
    yield _sent(PLAIN, "a prompt over the context", prompt="x " * 20000)
    yield _sent(PLAIN, "token ids over the context", prompt=[5] * 9000)
    yield _sent(CHAT, "a prompt over the context", messages=[{"role": "user", "content": "x " * 20000}])
    yield _sent(CHAT, "tools", tools=[_TOOL])
    yield _sent(CHAT, "tools that are none", tools=[{"type": "function"}])
    yield _sent(CHAT, "a tool that must be called", tools=[_TOOL], tool_choice="required")
    yield _sent(CHAT, "JSON wanted", response_format={"type": "json_object"}, max_tokens=8)
    yield _sent(CHAT, "a format that is none", response_format={"type": "odd"})
    yield _sent(CHAT, "an unknown field", no_such_field=1)
    yield _sent(CHAT, "stream with usage", stream=True, stream_options={"include_usage": True})
    yield _sent(CHAT, "stream_options of a wrong type", stream=True, stream_options=5)
    yield _sent(CHAT, "log probabilities", logprobs=True, top_logprobs=2)
    yield _sent(CHAT, "a chat template", chat_template="{{ messages[0]['content'] }}")
    yield _sent(RESPONSES, "stream", stream=True)
    yield _sent(MESSAGES, "stream", stream=True)
    yield _sent(MESSAGES, "a tool", tools=[{"name": "add", "input_schema": {"type": "object", "properties": {}}}])


def _paths() -> Iterator[Odd]:
    """Paths and methods, those that no server has among them."""
    body = _json(BODIES[PLAIN])
    for path in (
        "/v1/embeddings",
        "/v1/rerank",
        "/rerank",
        "/v2/rerank",
        "/v1/score",
        "/score",
        "/pooling",
        "/classify",
        "/v1/audio/transcriptions",
        "/v1/audio/speech",
        "/v1/images/generations",
        "/inference/v1/generate",
        "/v1/no/such",
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        "/v1/completions/render",
        "/invocations",
        "/no-such",
        "/v1/load_lora_adapter",
        "/pause",
        "/sleep",
        "/reset_prefix_cache",
        "/v1/responses/resp_none/cancel",
    ):
        yield Odd(name=f"POST {path}", path=path, body=body)
    for path in (
        "/v1/models",
        f"/v1/models/{MODEL}",
        "/v1/models/none",
        "/v1/models/a%2Fb",
        "/v1/models?x=1",
        "/v1/completions",
        "/v1/responses/resp_none",
        "/version",
        "/ping",
        "/load",
        "/",
        "/v1",
        "/v1/",
        "/docs",
        "/v1/files",
    ):
        yield Odd(name=f"GET {path}", path=path, method="GET", headers=())
    for path in (
        PLAIN + "/",
        "//v1/completions",
        "/v1//completions",
        "/V1/completions",
        "/v1/Completions",
        "/v1/completions%20",
        "/v1/../v1/completions",
        "/v1/%63ompletions",
        "/v1/completions?a=b",
        "/v1/completions#x",
        "/v1/completions;x",
    ):
        yield Odd(name=f"POST {path}", path=path, body=body)
    for method in ("PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"):
        yield Odd(name=f"{method} {PLAIN}", path=PLAIN, body=body, method=method)


def _heads() -> Iterator[Odd]:
    """Headers."""
    body = _json(BODIES[PLAIN])
    kinds = (
        "",
        "text/plain",
        "application/json; charset=utf-8",
        "application/json; charset=latin-1",
        "APPLICATION/JSON",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=b",
        "application/xml",
        "json",
        "*/*",
    )
    for kind in kinds:
        headers = (("content-type", kind),) if kind else ()
        yield Odd(name=f"content-type: {kind or 'none'}", path=PLAIN, body=body, headers=headers)
    for name, value in (
        ("accept", "text/html"),
        ("accept", "text/event-stream"),
        ("accept-encoding", "gzip"),
        ("accept-encoding", "br, zstd"),
        ("expect", "100-continue"),
        ("x-request-id", "mine"),
        ("authorization", "Bearer none"),
        ("x-api-key", "none"),
        ("cookie", "a=b"),
        ("range", "bytes=0-1"),
        ("if-none-match", "*"),
        ("x-long", "x" * 8000),
    ):
        yield Odd(name=f"{name}: {value[:20]}", path=PLAIN, body=body, headers=(*_JSON, (name, value)))


def _bodies() -> Iterator[Odd]:
    """What is no JSON, or only just."""
    good = _json(BODIES[PLAIN])
    for name, body in (
        ("no body", b""),
        ("null", b"null"),
        ("a list", b"[]"),
        ("a text", b'"x"'),
        ("a number", b"5"),
        ("an empty object", b"{}"),
        ("half", good[:-5]),
        ("garbage behind", good + b"x"),
        ("blanks around", b" \n" + good + b"\n "),
        ("not UTF-8", b'{"a":"\xff"}'),
        ("a byte order mark", b"\xef\xbb\xbf" + good),
        ("UTF-16", good.decode().encode("utf-16")),
        ("a key twice", good[:-1] + b',"max_tokens":2}'),
        ("NaN", good[:-1] + b',"temperature":NaN}'),
        ("Infinity", good[:-1] + b',"top_p":Infinity}'),
        ("single quotes", good.replace(b'"', b"'")),
        ("a comment", good[:-1] + b"/* */}"),
        ("a comma too many", good[:-1] + b",}"),
        ("deep", b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
        ("a lone surrogate", good[:-1] + b',"user":"\\ud800"}'),
        ("a number of 5000 digits", good[:-1] + b',"seed":' + b"9" * 5000 + b"}"),
    ):
        yield Odd(name=f"body: {name}", path=PLAIN, body=body)
    yield Odd(name="body: gzip", path=PLAIN, body=gzip.compress(good), headers=(*_JSON, ("content-encoding", "gzip")))
    yield Odd(name="body: says gzip", path=PLAIN, body=good, headers=(*_JSON, ("content-encoding", "gzip")))
    yield Odd(name="body: brotli", path=PLAIN, body=good, headers=(*_JSON, ("content-encoding", "br")))


_JSON = (("content-type", "application/json"),)


def _sent(path: str, name: str, **fields: Any) -> Odd:
    return Odd(name=f"{path}: {name}", path=path, body=_json(BODIES[path] | fields))


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"
