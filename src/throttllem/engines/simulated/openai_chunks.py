"""What the simulated engine reads in the body of a completion or a chat, and the bytes that it answers with.

Events are put together from templates made once per answer. Knows nothing of time, batching or sockets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from throttllem.engines.paths import CHAT
from throttllem.engines.simulated.text import estimate_tokens

_MESSAGE_TOKENS = 4
"""What a chat template puts around each message."""
_CANNOT = ("logprobs", "top_logprobs", "echo", "suffix", "audio", "guided_json", "structured_outputs")


class BadBodyError(Exception):
    """A body that cannot be served: what the client should see."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code

    def body(self) -> bytes:
        """As OpenAI's API words errors."""
        kind = "invalid_request_error"
        return dumped({"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedBody:
    """What a body asks for. `prompt` is what the answer of a `fixed` one depends on: given a `seed`, or no temperature,
    equal bodies get equal answers. `max_tokens` None: no limit was named.
    """

    chat: bool
    prompt: object
    max_tokens: int | None
    min_tokens: int
    stream: bool
    include_usage: bool
    ignore_eos: bool
    seed: int | None
    fixed: bool
    stops: tuple[str, ...]


def dumped(value: object) -> bytes:
    """JSON without spaces, as the API sends it."""
    return json.dumps(value, separators=(",", ":")).encode()


def read_wish(path: str, body: Mapping[str, object], model: str) -> ParsedBody:
    """Raises BadBodyError for what is malformed, or more than this engine can do."""
    if body.get("model", model) != model:
        message = f"The model `{str(body['model'])[:80]}` does not exist; this engine serves `{model}`."
        raise BadBodyError(message, param="model", status=404, code="model_not_found")
    _refuse_what_it_cannot(body)
    chat = path == CHAT
    prompt = _messages(body) if chat else _prompt(body)
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    limits = [limit for name in names if (limit := _number(body, name, least=1)) is not None]
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise BadBodyError("stream_options must be an object", param="stream_options")
    seed = _number(body, "seed")
    return ParsedBody(
        chat=chat,
        prompt=prompt,
        max_tokens=limits[0] if limits else None,
        min_tokens=_number(body, "min_tokens", least=0) or 0,
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        ignore_eos=_flag(body, "ignore_eos"),
        seed=seed,
        fixed=seed is not None or body.get("temperature") == 0,
        stops=_stops(body),
    )


def prompt_tokens(prompt: object, *, most_tokens: int) -> tuple[int, bool]:
    """Tokens of one prompt (a text, token ids) or of the messages of a chat, and whether the count is exact."""
    if isinstance(prompt, str):
        tokens, exact = estimate_tokens(prompt, most_tokens=most_tokens)
        return max(1, tokens), exact
    items = list(prompt) if isinstance(prompt, list | tuple) else []
    if not items or not isinstance(items[0], Mapping):
        return max(1, len(items)), True
    counts = [estimate_tokens(_text(message), most_tokens=most_tokens) for message in items]
    return sum(tokens + _MESSAGE_TOKENS for tokens, _ in counts), all(exact for _, exact in counts)


def _text(message: object) -> str:
    """The words of a message; parts that are no text have none."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


def _refuse_what_it_cannot(body: Mapping[str, object]) -> None:
    for name in ("n", "best_of"):
        if (_number(body, name, least=1) or 1) > 1:
            raise BadBodyError(f"{name}: the simulated engine gives one answer to a prompt", param=name)
    for name in _CANNOT:
        if body.get(name) not in (None, False, ""):
            raise BadBodyError(f"{name}: the simulated engine cannot do this", param=name)
    if body.get("tool_choice") not in (None, "none", "auto"):
        raise BadBodyError("tool_choice: the simulated engine calls no tools", param="tool_choice")
    wanted = body.get("response_format")
    if wanted is not None and not (isinstance(wanted, Mapping) and wanted.get("type") == "text"):
        raise BadBodyError("response_format: the simulated engine writes plain text only", param="response_format")


def _messages(body: Mapping[str, object]) -> object:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadBodyError("messages must be a list of at least one message", param="messages")
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else 0
        if isinstance(content, list):
            if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
                continue
            raise BadBodyError("messages: the simulated engine reads text parts only", param="messages")
        if content is not None and not isinstance(content, str):
            raise BadBodyError("messages: each must be an object with a text as content", param="messages")
    return messages


def _prompt(body: Mapping[str, object]) -> object:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise BadBodyError("prompt: the simulated engine takes one prompt a request", param="prompt")
        prompt = prompt[0]
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(part) is int for part in prompt)):
        return prompt
    raise BadBodyError("prompt must be a text or a list of token ids", param="prompt")


def _stops(body: Mapping[str, object]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise BadBodyError("stop must be a text or a list of texts", param="stop")
    return tuple(text for text in stops if text)


def _number(body: Mapping[str, object], name: str, *, least: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise BadBodyError(f"{name} must be a whole number{bound}", param=name)
    return value


def _flag(body: Mapping[str, object], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadBodyError(f"{name} must be true or false", param=name)
    return bool(value)
