"""Reads the requests of the APIs under control (`Api`) into a ParsedRequest.

Checks only the fields that admission and scheduling depend on, and takes them as vLLM does (`"4"` and `4.0` are 4);
every other field is the engine's to check. The body goes on to the engine as it came, unless it holds the gateway's own
field `throttllem`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from msgspec import Raw
from pydantic_core import from_json

from throttllem.openai_api.conversations import chat_of_message, chat_of_response
from throttllem.openai_api.errors import MESSAGES, RESPONSES, ApiError, invalid
from throttllem.openai_api.large_bodies import (
    LARGE_BYTES,
    model_in,
    named_values,
    prompt_lengths,
    read_value,
    with_model,
    without,
)
from throttllem.openai_api.lax import token_ids, truth, whole_number
from throttllem.openai_api.multipart import model_in_form

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
NATIVE = re.compile(r"/v2/models/([^/]+)(?:/versions/[^/]+)?/generate(_stream)?")
"""Triton's native paths: the model, and whether the answer may be streamed."""
COMPLETION_TOKENS = 16
"""The output tokens of a completion that names no limit, by OpenAI's API."""
OWN_FIELD = "throttllem"
_LARGEST = 2**31 - 1
_MOST_SEQUENCES = 4096
"""Sequences of one request while no engine has reported its batch size."""
_CALLER_CHARACTERS = 64
_OBJECTS = re.compile(rb"\[\s*\{")
_UNREAD_TEXTS = ("user", "metadata")
"""Fields whose texts no engine tokenizes or hands on."""
_COMPLETION_COUNTS = ("max_tokens", "n")
_CHAT_COUNTS = ("max_tokens", "max_completion_tokens", "n")

Prompts = tuple[str | Raw | Sequence[int], ...]


class Api(StrEnum):
    """The APIs whose requests are under control: how a request is read, its stream counted, its errors written."""

    COMPLETIONS = "completions"
    CHAT = "chat"
    RESPONSES = "responses"
    """OpenAI's Responses: a stream of typed events."""
    MESSAGES = "messages"
    """Anthropic's Messages: a stream of typed events, and errors of another shape."""
    NATIVE = "native"
    """Triton's `generate`."""


PATHS = MappingProxyType(
    {COMPLETIONS: Api.COMPLETIONS, CHAT: Api.CHAT, RESPONSES: Api.RESPONSES, MESSAGES: Api.MESSAGES}
)
"""The API of each path; those of Triton's are NATIVE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A request under control. `fields` are its JSON fields without the gateway's own, those that were read as what
    they stand for, `body` the bytes for the engine. `model` "": the client named none.

    `prompts` are texts or token ids; a conversation has none, but `chat`: the fields of the chat that has the same
    prompt (None: the request alone does not show it). Of a body over LARGE_BYTES, `fields` has what the gateway reads,
    values over LARGE_BYTES undecoded, as Raw. `max_tokens` None: the client named no limit. `choices`: answers per
    prompt, which begin with it if `echo`. `include_usage`: the stream ends with a usage chunk. `caller`: a name of the
    API key, or the client's `user`, "" if neither. `metrics`: the answer shall carry the gateway's metrics.
    """

    api: Api
    path: str
    model: str
    fields: dict[str, Any] = field(repr=False)
    body: bytes = field(repr=False)
    prompts: Prompts = ()
    chat: dict[str, Any] | None = field(default=None, repr=False)
    max_tokens: int | None = None
    choices: int = 1
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    caller: str = ""
    metrics: bool = False

    @property
    def is_conversation(self) -> bool:
        """Whether its prompt is made of messages."""
        return self.api in (Api.CHAT, Api.RESPONSES, Api.MESSAGES)

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent to an engine twice: what /v1/responses makes is stored, or goes on in background."""
        return self.api is not Api.RESPONSES

    @property
    def service_tier(self) -> str | None:
        """The service tier that the body names, None if it names none; any other value is the engine's to refuse."""
        tier = self.fields.get("service_tier")
        return tier if isinstance(tier, str) else None

    @property
    def sequences(self) -> int:
        """Sequences that the engine generates side by side."""
        return max(1, len(self.prompts)) * self.choices

    def named(self, model: str) -> ParsedRequest:
        """The same for the model of another name: only the value of `model` in the body differs. Raises ApiError."""
        if self.api is Api.NATIVE or "model" not in self.fields:
            return self
        return replace(self, model=model, fields={**self.fields, "model": model}, body=with_model(self.body, model))

    def counted(self) -> ParsedRequest:
        """The same once its tokens are counted: a large body is kept as its bytes alone (`whole` reads it again)."""
        if len(self.body) <= LARGE_BYTES:
            return self
        return replace(self, fields={}, chat=None, prompts=("",) * len(self.prompts))

    def whole(self) -> ParsedRequest:
        """The same with every field decoded, for engines that translate it. Raises ApiError 400 for what is too large
        to be decoded at once. Large bodies take up to a second: call it in a thread.
        """
        if len(self.body) <= LARGE_BYTES:
            return self
        return replace(parse_request(self.path, self.body, whole=True), caller=self.caller, metrics=self.metrics)


def is_controlled(path: str) -> bool:
    """Whether a POST to this path goes through the control core."""
    return path in PATHS or NATIVE.fullmatch(path) is not None


def parse_request(
    path: str, body: bytes, *, key_name: str | None = None, metrics: bool = False, whole: bool = False
) -> ParsedRequest:
    """The request with this path (no query) and body. `key_name`: the API key's name; `metrics`: asked for by header.
    `whole`: a large body's fields too are all there, and decoded.

    Raises ApiError 400 naming the field. Called for every request: a plain one costs a handful of calls. A body over
    OFF_LOOP_BYTES should be read in a thread.
    """
    fields = _json_object(body, whole=whole)
    if OWN_FIELD in fields:
        own = fields.pop(OWN_FIELD)
        metrics = _wants_metrics(own) or metrics
        body = _json_bytes(fields) if len(body) <= LARGE_BYTES else without(body, OWN_FIELD)
    user = fields.get("user")
    caller = key_name or (_caller(user) if user else "")
    api = PATHS.get(path, Api.NATIVE)
    return _READERS[api](path, fields, body, caller, metrics)


def check_sequences(request: ParsedRequest, most: int | None) -> None:
    """Refuse more sequences than `most`, the largest batch of any engine (None: not known). Raises ApiError 400."""
    most = _MOST_SEQUENCES if most is None else most
    if request.sequences > most:
        raise invalid(
            f"{len(request.prompts) or 1} prompts with {request.choices} answers each; at most {most} answers run side "
            "by side: ask for fewer at a time",
            "prompt" if len(request.prompts) > most else "n",
            code="too_many_sequences",
        )


def check_translated(request: ParsedRequest, engine: str) -> None:
    """Refuse what an engine that translates requests has no translation of. Raises ApiError 404."""
    if request.api in (Api.RESPONSES, Api.MESSAGES):
        raise ApiError(404, f"{engine} does not serve {request.path}; use {CHAT}", code="not_found")


def model_of(body: bytes, content_type: str = "") -> str | None:
    """The model that a request outside of control names in its JSON or its form; None if it names none.

    Raises ApiError 400 for a body that would take too long to read.
    """
    form = content_type[:10].lower() == "multipart/"
    return model_in_form(body, content_type) if form else model_in(body)


def stop_texts(request: ParsedRequest) -> tuple[str, ...]:
    """The texts at which the answer ends. Raises ApiError 400 if `stop` is neither a text nor a list of texts.

    For engines that generate answers here; the gateway leaves the field to the engine.
    """
    stop = request.fields.get("stop")
    texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise invalid("stop: must be a text or a list of texts", "stop")
    return tuple(text for text in texts if text)


def _openai_request(path: str, fields: dict[str, Any], body: bytes, caller: str, metrics: bool) -> ParsedRequest:
    chat, model, stream = path == CHAT, fields.get("model"), fields.get("stream")
    if model is not None and not isinstance(model, str):
        raise invalid("model: must be the name of a model", "model")
    _read_counts(fields, _CHAT_COUNTS if chat else _COMPLETION_COUNTS)
    limited_by, limit, choices = "max_tokens", fields.get("max_tokens"), fields.get("n")
    prompts: Prompts = ()
    echo = False
    if chat:
        if (newer := fields.get("max_completion_tokens")) is not None:
            limited_by, limit = "max_completion_tokens", newer
        messages = fields.get("messages")
        if not _are_messages(messages):
            raise invalid("messages: must be a list of at least one message object", "messages")
    else:
        prompt = fields.get("prompt")
        prompts = (prompt,) if isinstance(prompt, str) else _prompts(prompt)
        if (echoes := fields.get("echo")) is not None:
            echo = truth(echoes) is True
        if limit == 0 and echo:
            limit = 1  # the engine computes one token, and does not send it
        if (best_of := fields.get("best_of")) is not None:
            choices = max(1 if choices is None else choices, whole_number(best_of) or 1)
    if limit is not None and not 1 <= limit <= _LARGEST:
        raise invalid(f"{limited_by}: must be a whole number from 1 to {_LARGEST}", limited_by)
    if choices is not None and not 1 <= choices <= _LARGEST:
        raise invalid(f"n: must be a whole number from 1 to {_LARGEST}", "n")
    if stream is not None and stream is not True and stream is not False:
        fields["stream"] = stream = truth(stream)
        if stream is None:
            raise invalid("stream: must be true or false", "stream")
    options = fields.get("stream_options")
    return ParsedRequest(
        api=Api.CHAT if chat else Api.COMPLETIONS,
        path=path,
        model=model or "",
        fields=fields,
        body=body,
        prompts=prompts,
        chat=fields if chat else None,
        max_tokens=limit,
        choices=choices or 1,
        echo=echo,
        stream=bool(stream),
        include_usage=isinstance(options, dict) and truth(options.get("include_usage")) is True,
        caller=caller,
        metrics=metrics,
    )


def _conversation(path: str, fields: dict[str, Any], body: bytes, caller: str, metrics: bool) -> ParsedRequest:
    """A request of Responses or Messages; what is wrong with its conversation the engine finds."""
    api, model, stream = PATHS[path], fields.get("model"), fields.get("stream")
    if model is not None and not isinstance(model, str):
        raise invalid("model: must be the name of a model", "model")
    if fields.get("background"):
        message = "background: a response without an open request runs beside every SLO; send it without background"
        raise invalid(message, "background")
    limited_by = "max_output_tokens" if api is Api.RESPONSES else "max_tokens"
    _read_counts(fields, (limited_by,))
    limit = fields.get(limited_by)
    if limit is not None and not 1 <= limit <= _LARGEST:
        raise invalid(f"{limited_by}: must be a whole number from 1 to {_LARGEST}", limited_by)
    streams = None if stream is None else truth(stream)
    if stream is not None and streams is None:
        raise invalid("stream: must be true or false", "stream")
    large = len(body) > LARGE_BYTES
    return ParsedRequest(
        api=api,
        path=path,
        model=model or "",
        fields=fields,
        body=body,
        chat=None if large else chat_of_response(fields) if api is Api.RESPONSES else chat_of_message(fields),
        max_tokens=limit,
        stream=bool(streams),
        include_usage=True,
        caller=caller,
        metrics=metrics,
    )


def _native_request(path: str, fields: dict[str, Any], body: bytes, caller: str, metrics: bool) -> ParsedRequest:
    """A call of Triton's `generate` or `generate_stream`; a tensor of one element may be written as a list."""
    match = NATIVE.fullmatch(path)
    if match is None:
        raise ApiError(404, f"{path} takes no completion and no chat", code="not_found")
    texts, limit, stream = fields.get("text_input"), fields.get("max_tokens"), fields.get("stream")
    if isinstance(texts, Raw):
        texts = list(prompt_lengths(texts) or ())
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str | Raw) for text in texts):
        raise invalid("text_input must be a text", "text_input")
    limit = limit[0] if isinstance(limit, list) and len(limit) == 1 else limit
    if limit is not None and (type(limit) is not int or not 1 <= limit <= _LARGEST):
        raise invalid(f"max_tokens: must be a whole number from 1 to {_LARGEST}", "max_tokens")
    # generate_stream without "stream": true sends the whole answer as one event, which is no token.
    streams = match[2] is not None and stream is not None
    if streams and not isinstance(stream, bool):
        raise invalid("stream: must be true or false", "stream")
    return ParsedRequest(
        api=Api.NATIVE,
        path=path,
        model=match[1],
        fields=fields,
        body=body,
        prompts=tuple(texts),
        max_tokens=limit,
        stream=streams and bool(stream),
        caller=caller,
        metrics=metrics,
    )


_READERS = MappingProxyType(
    {
        Api.COMPLETIONS: _openai_request,
        Api.CHAT: _openai_request,
        Api.RESPONSES: _conversation,
        Api.MESSAGES: _conversation,
        Api.NATIVE: _native_request,
    }
)


def _read_counts(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    """Replace what stands for a whole number by the number."""
    for name in names:
        count = fields.get(name)
        # type() rather than isinstance: true is no number yet.
        if count is not None and type(count) is not int:
            fields[name] = count = whole_number(count)
            if count is None:
                raise invalid(f"{name}: must be a whole number from 1 to {_LARGEST}", name)


def _are_messages(value: Any) -> bool:
    """A list of objects; of a large one only its beginning is looked at, the engine checks the rest."""
    if isinstance(value, Raw):
        return _OBJECTS.match(value) is not None
    return isinstance(value, list) and {*map(type, value)} == {dict}


def _prompts(value: Any) -> Prompts:
    """The three shapes of a prompt besides a text: texts, token ids, lists of token ids."""
    if isinstance(value, Raw):
        if (lengths := prompt_lengths(value)) is not None:
            return lengths
        value = read_value("prompt", value)  # ids may be written otherwise, as `1.0`
    if isinstance(value, list) and value:
        if {*map(type, value)} == {str}:
            return tuple(value)
        each = value if isinstance(value[0], list) else [value]
        read = token_ids(each)
        if read is not None and all(read) and min(map(min, read)) >= 0 and max(map(max, read)) <= _LARGEST:
            return tuple(map(tuple, read))
    message = "prompt: must be a string, a list of strings, token ids, or a list of lists of token ids"
    raise invalid(message, "prompt")


def _caller(user: object) -> str:
    """The caller in at most `_CALLER_CHARACTERS`; two long names stay different."""
    if not isinstance(user, str):
        return ""
    if len(user) <= _CALLER_CHARACTERS:
        return user
    digest = hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{user[: _CALLER_CHARACTERS - len(digest) - 1]}~{digest}"


def _wants_metrics(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() - {"metrics"} or not isinstance(value.get("metrics", False), bool):
        raise invalid(f"{OWN_FIELD}: must be an object with the one key metrics, true or false", OWN_FIELD)
    return bool(value.get("metrics"))


def _json_object(body: bytes, *, whole: bool) -> dict[str, Any]:
    if len(body) > LARGE_BYTES:
        return named_values(body, decoded=whole)
    try:
        try:
            fields = from_json(body)
        except ValueError:
            fields = json.loads(body)  # as engines in Python read it: UTF-16, UTF-32, lone surrogates
            _check_texts(fields)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(fields, dict):
        raise invalid("the body must be a JSON object")
    return fields


def _check_texts(fields: object) -> None:
    """Refuse a lone surrogate where an engine would use it: no text holds one, and vLLM answers it with a 500."""
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name in _UNREAD_TEXTS:
            continue
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise invalid(f"{name[:80]}: holds half of a surrogate pair, which is no character", name[:80]) from None


def _json_bytes(fields: dict[str, Any]) -> bytes:
    try:
        return json.dumps(fields, separators=(",", ":")).encode()
    except ValueError as error:
        # Python refuses to write an integer of thousands of digits, which it has read.
        raise invalid(f"the body cannot be written again: {error}") from error
