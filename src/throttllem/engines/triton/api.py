"""What OpenAI's API asks, in the words of a TensorRT-LLM model on Triton; and Triton's refusals in OpenAI's shape.

Bodies in, bodies out; knows no connection. The inputs are those of the `ensemble` of NVIDIA's tensorrtllm_backend; a
field that a model has no input for is refused rather than dropped, since Triton itself drops what it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeGuard

from pydantic_core import from_json, to_json

from throttllem.engines.base import Headers, ParsedRequest, Reply, whole_reply
from throttllem.engines.paths import NATIVE

JSON: Headers = (("content-type", "application/json"),)

ENSEMBLE = frozenset(
    {"text_input", "max_tokens", "stream", "bad_words", "stop_words", "end_id", "pad_id", "top_k", "top_p", "seed"}
    | {"temperature", "length_penalty", "repetition_penalty", "min_tokens", "presence_penalty", "frequency_penalty"}
)
"""Inputs taken to exist where Triton does not give the model's configuration."""
_NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty")
_LEAST = ("min_tokens", "min_length")
_COUNTS = {"top_k": ("top_k",), "seed": ("seed", "random_seed"), "min_tokens": _LEAST}
"""Whole numbers, and the inputs that may take them: older releases use the second name."""
_READ = frozenset({"model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options"})
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
    | {"throttllem"}
)
"""Fields that do not change the answer."""
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_tokens": (0,),
    "suffix": ("",),
    "stop": ([], ""),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "stream_options": ({},),
}
"""Values that ask for nothing, beside null and false."""


class UnsupportedError(ValueError):
    """A request that Triton cannot serve as it was asked; `param` names the field (None: the whole)."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> bytes:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return to_json({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_reply(message: str, status: int, *, param: str | None = None, code: str | None = None) -> Reply:
    """The reply that holds such an error."""
    return whole_reply(status, JSON, error_body(message, status, param=param, code=code))


def refused(body: bytes) -> str:
    """The words of an error that Triton answered with, be it JSON or an event of a stream."""
    text = body.removeprefix(b"data:").strip()
    try:
        found = from_json(text)
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("error"), str):
        return str(found["error"])
    return body[:500].decode(errors="replace") or "the engine gave no reason"


def parse_native(path: str, body: bytes | Mapping[str, object]) -> ParsedRequest | None:
    """What a call of Triton's own `generate` or `generate_stream` asks; None for every other path.

    Raises ValueError if the body is no JSON object or its `text_input` no text. `model` is the path's.
    """
    match = NATIVE.fullmatch(path.partition("?")[0])
    if match is None:
        return None
    found = from_json(body) if isinstance(body, bytes) else dict(body)
    if not isinstance(found, dict):
        raise ValueError("the body must be a JSON object")
    texts = found.get("text_input")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("text_input must be a text")
    limit = found.get("max_tokens")
    limit = limit[0] if isinstance(limit, list) and len(limit) == 1 else limit
    if limit is not None and (not _whole(limit) or limit < 1):
        raise ValueError(f"max_tokens = {limit!r}: must be a whole number from 1 up")
    return ParsedRequest(
        path=path, model=match[1], body=found, prompts=tuple(texts), max_tokens=limit, stream=match[2] is not None
    )


def prompt_text(body: Mapping[str, object]) -> str:
    """The one text to be completed. Raises UnsupportedError for several of them, and for token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        raise UnsupportedError("prompt", "prompt: this engine takes one text per request")
    raise UnsupportedError("prompt", "prompt: this engine takes text, no token ids")


def token_limit(body: Mapping[str, object], *, chat: bool) -> int | None:
    """Most tokens of the answer, None where none is named. Raises UnsupportedError for what is no such number."""
    for name in ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",):
        limit = body.get(name)
        if limit is None:
            continue
        if not _whole(limit) or limit < 1:
            raise UnsupportedError(name, f"{name} = {limit!r}: must be a whole number from 1 up")
        return limit
    return None


def wants_usage(body: Mapping[str, object]) -> bool:
    """Whether a stream shall end with a chunk that holds the usage."""
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def stop_words(body: Mapping[str, object]) -> tuple[str, ...]:
    """The texts that end the answer. Raises UnsupportedError if `stop` is neither a text nor a list of them."""
    stop = body.get("stop")
    words = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UnsupportedError("stop", f"stop = {stop!r}: must be a text or a list of texts")
    return tuple(word for word in words if word)


def to_triton(
    body: Mapping[str, object], *, text: str, limit: int, inputs: frozenset[str] = ENSEMBLE
) -> dict[str, object]:
    """The body of `generate_stream` for an OpenAI body with this prompt. Raises UnsupportedError naming the field.

    Greedy (temperature 0) is asked for as top_k 1: TensorRT-LLM divides by the temperature. It is greedy also where
    neither top_k nor top_p is given, so that a temperature alone brings top_p 1.
    """
    asked = {name: value for name, value in body.items() if not _neutral(name, value)}
    _check_fields(asked, inputs)
    native: dict[str, object] = {"text_input": text, "max_tokens": limit, "stream": True}
    native |= {name: _number(name, asked[name]) for name in _NUMBERS if name in asked}
    for name, takers in _COUNTS.items():
        if name in asked:
            native[_taker(name, takers, inputs)] = _count(name, asked[name])
    if "ignore_eos" in asked:
        # TensorRT-LLM bars the end token until the answer has its least length.
        native[_taker("min_tokens", _LEAST, inputs)] = limit
    if stops := stop_words(body):
        # The answer is cut at the stop word in any case; a model that knows it stops by itself.
        native |= {"stop_words": list(stops)} if "stop_words" in inputs else {}
    if native.get("temperature") == 0:
        del native["temperature"]
        native |= {"top_k": 1}
    elif "temperature" in native and not native.keys() & {"top_k", "top_p"} and "top_p" in inputs:
        native["top_p"] = 1.0
    return native | {name: value for name, value in asked.items() if name in inputs and name not in _KNOWN}


_KNOWN = _READ | _IGNORED | _COUNTS.keys() | frozenset(_NUMBERS) | {"stop", "text_input", "ignore_eos"}


def _check_fields(asked: Iterable[str], inputs: frozenset[str]) -> None:
    for name in asked:
        takers = _LEAST if name == "ignore_eos" else _COUNTS.get(name, (name,))
        if name not in _READ | _IGNORED | {"stop"} and not inputs.intersection(takers):
            raise UnsupportedError(name, f"{name}: this engine (Triton) has no such input; leave the field out")
        if name in {"text_input", "n", "beam_width"}:
            raise UnsupportedError(name, f"{name}: not taken here; one answer per request")


def _neutral(name: str, value: object) -> bool:
    # 0 == False in Python, but `logprobs: 0` asks for something.
    if value is None or value is False:
        return True
    return not isinstance(value, bool) and any(value == none for none in _NEUTRAL.get(name, ()))


def _taker(name: str, takers: tuple[str, ...], inputs: frozenset[str]) -> str:
    return next((taker for taker in takers if taker in inputs), name)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedError(name, f"{name} = {value!r}: must be a number")
    return value


def _count(name: str, value: object) -> int:
    if not _whole(value) or value < 0:
        raise UnsupportedError(name, f"{name} = {value!r}: must be a whole number from 0 up")
    return value
