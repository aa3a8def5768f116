"""What a request asks for: its body read into an Ask, its promises and wishes read from headers.

Checks only what the control core stands on; everything else in a body is the engine's to judge. Knows no sockets.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pydantic_core

from throttllem.core.types import Slo
from throttllem.engines.base import ParsedRequest
from throttllem.engines.paths import CHAT, COMPLETIONS, NATIVE
from throttllem.engines.triton.api import parse_native
from throttllem.gateway.http.errors import HttpError, invalid

OWN_KEY = "throttllem"
_MOST = 2**31 - 1
_MOST_PARTS = 200_000
"""A larger body may have so many lists and objects, and as many keys. Parsing holds up everybody, also in a thread (the
parser never lets go of the interpreter): 0.7 s for 8 MB of brackets, under 0.1 s with this bound.
"""
_SURELY_SMALL = 100_000
_MOST_SEQUENCES = 4096
"""Answers side by side while no engine has said how many it can run."""
_CALLER_CHARACTERS = 64
_PROMISES = (("x-slo-ttft-ms", "ttft_s"), ("x-slo-tpot-ms", "tbt_s"), ("x-slo-e2e-ms", "e2e_s"))
_PROMISE_HEADERS = ("x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-e2e-ms", "x-slo-class")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedBody:
    """A controlled request, read: the Ask, the bytes to send on, who asks, whether the answer shall carry `metrics`."""

    ask: ParsedRequest
    body: bytes
    caller: str
    metrics: bool


def controlled(path: str) -> bool:
    """Whether POST to this path goes through the control core."""
    return path in (COMPLETIONS, CHAT) or is_native(path)


def is_native(path: str) -> bool:
    """Whether this path is Triton's own way to ask."""
    return NATIVE.fullmatch(path) is not None


def check_sequences(ask: ParsedRequest, most: int | None) -> None:
    """Refuse more answers side by side than any engine can run (None: not known). Raises HttpError 400."""
    most = _MOST_SEQUENCES if most is None else most
    if ask.sequences > most:
        raise HttpError(
            400,
            f"{len(ask.prompts) or 1} prompts with {ask.choices} answers each; at most {most} answers run side by "
            "side: ask for fewer at a time",
            param="prompt" if len(ask.prompts) > most else "n",
            code="too_many_sequences",
        )


def read_wish(path: str, body: bytes, headers: Mapping[str, str], key_name: str | None) -> ParsedBody:
    """The body of a controlled request. `key_name`: which API key was shown. Raises HttpError 400, naming the field."""
    fields = _json_object(body)
    metrics = headers.get("x-throttllem-metrics", "").strip() == "1"
    if OWN_KEY in fields:
        metrics = _own(fields.pop(OWN_KEY)) or metrics
        body = _json_bytes(fields)
    user = fields.get("user")
    caller = key_name or _caller(user)
    ask = _openai(path, fields) if path in (COMPLETIONS, CHAT) else _native(path, fields)
    return ParsedBody(ask=ask, body=body, caller=caller, metrics=metrics)


def model_of(body: bytes) -> str | None:
    """The model that a request without control names in a JSON body; None where there is none to be found.

    Raises HttpError 400 for a body that would take too long to read.
    """
    if body.lstrip()[:1] != b"{":
        return None
    _check_parts(body)
    try:
        fields = pydantic_core.from_json(body)
    except ValueError:
        return None
    model = fields.get("model")
    return model if isinstance(model, str) else None


def read_slo(headers: Mapping[str, str], default: Slo, classes: Mapping[str, Slo]) -> Slo:
    """The promise that a request asks for: a class by name, then single times. Raises HttpError 400."""
    slo = default
    name = headers.get("x-slo-class")
    if name is not None:
        if name not in classes:
            known = ", ".join(sorted(classes)) or "none are configured"
            raise invalid(f"x-slo-class: {name!r} is not known here; known classes: {known}", "x-slo-class")
        slo = classes[name]
    for header in headers:
        if header.startswith("x-slo-") and header not in _PROMISE_HEADERS:
            meant = header.replace("tbt", "tpot").replace("itl", "tpot")  # other names of the same promise
            near = difflib.get_close_matches(meant, _PROMISE_HEADERS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_PROMISE_HEADERS)}"
            raise invalid(f"{header[:80]} is no promise that is known; {hint}", header[:80])
    for header, field in _PROMISES:
        if header in headers:
            slo = replace(slo, **{field: _milliseconds(header, headers[header])})
    return slo


def _milliseconds(header: str, text: str) -> float:
    try:
        seconds = float(text) / 1000
    except ValueError:
        seconds = math.nan
    if "_" in text or not 0 < seconds < math.inf:
        raise invalid(f"{header}: {text[:40]!r} must be a positive number of milliseconds", header)
    return seconds


def _caller(user: object) -> str:
    """Who asks, at no more than `_CALLER_CHARACTERS`; two that are longer stay two."""
    if not isinstance(user, str):
        return ""
    if len(user) <= _CALLER_CHARACTERS:
        return user
    digest = hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{user[: _CALLER_CHARACTERS - len(digest) - 1]}~{digest}"


def _check_parts(body: bytes) -> None:
    if len(body) > _SURELY_SMALL and max(body.count(b"[") + body.count(b"{"), body.count(b":")) > _MOST_PARTS:
        raise invalid(f"the body has more lists, objects or keys than {_MOST_PARTS}")


def _json_object(body: bytes) -> dict[str, object]:
    _check_parts(body)
    try:
        fields = pydantic_core.from_json(body)
    except ValueError as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(fields, dict):
        raise invalid("the body must be a JSON object")
    return fields


def _json_bytes(fields: dict[str, object]) -> bytes:
    try:
        return json.dumps(fields, separators=(",", ":")).encode()
    except ValueError as error:
        # Python writes no integer of thousands of digits.
        raise invalid(f"the body cannot be written again: {error}") from error


def _own(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() - {"metrics"} or not isinstance(value.get("metrics", False), bool):
        raise invalid(f"{OWN_KEY}: must be an object with the one key metrics, true or false", OWN_KEY)
    return bool(value.get("metrics"))


def _openai(path: str, fields: dict[str, object]) -> ParsedRequest:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise invalid("model: must be the name of a model", "model")
    chat = path == CHAT
    limit = _count(fields, "max_tokens")
    if chat:
        limit = _count(fields, "max_completion_tokens") or limit
        _check_messages(fields.get("messages"))
    return ParsedRequest(
        path=path,
        model=model,
        body=fields,
        prompts=() if chat else _prompts(fields.get("prompt")),
        messages=chat,
        max_tokens=limit,
        choices=max(_count(fields, "n") or 1, 1 if chat else _count(fields, "best_of") or 1),
        stream=_flag(fields, "stream"),
    )


def _native(path: str, fields: dict[str, object]) -> ParsedRequest:
    try:
        ask = parse_native(path, fields)
    except ValueError as error:
        raise invalid(str(error)) from error
    assert ask is not None
    if ask.max_tokens is not None and ask.max_tokens > _MOST:
        raise invalid(f"max_tokens: must be a whole number from 1 to {_MOST}", "max_tokens")
    # generate_stream without "stream": true gives the whole answer as one event, which is no token.
    return replace(ask, stream=ask.stream and _flag(fields, "stream"))


def _flag(fields: dict[str, object], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{name}: must be true or false", name)
    return bool(value)


def _count(fields: dict[str, object], name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        raise invalid(f"{name}: must be a whole number from 1 to {_MOST}", name)
    return value


def _check_messages(value: object) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise invalid("messages: must be a list of at least one message object", "messages")


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    """OpenAI's four shapes: a text, texts, token ids, lists of token ids."""
    match value:
        case str():
            return (value,)
        case [str(), *_]:
            texts = tuple(text for text in value if isinstance(text, str))
            if len(texts) != len(value):
                raise _bad_prompt()
            return texts
        case [int(), *_]:
            return (_tokens(value),)
        case [list(), *_]:
            return tuple(_tokens(tokens) for tokens in value)
        case _:
            raise _bad_prompt()


def _tokens(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise _bad_prompt()
    # type() rather than isinstance: true and false are no token ids.
    if set(map(type, value)) != {int} or min(value) < 0 or max(value) > _MOST:
        raise _bad_prompt()
    return tuple(value)


def _bad_prompt() -> HttpError:
    return invalid("prompt: must be a string, a list of strings, token ids, or a list of lists of token ids", "prompt")
