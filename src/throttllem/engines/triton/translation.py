"""OpenAI's API in the terms of a TensorRT-LLM model on Triton: request bodies, and the stream of its tokens.

Inputs are those of the `ensemble` of NVIDIA's tensorrtllm_backend. A field that a model has no input for is refused,
not dropped, since Triton drops silently what it does not know. Bytes in, bytes out; knows no connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from throttllem.engines.triton.facts import ENSEMBLE
from throttllem.openai_api.errors import invalid
from throttllem.openai_api.event_stream import Splitter, data_of
from throttllem.openai_api.requests import ParsedRequest, stop_texts
from throttllem.openai_api.responses import escaped

_NUMBERS = {"temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty"}
_COUNTS = {"top_k", "seed", "min_tokens"}
_OTHER_NAMES = {"seed": "random_seed", "min_tokens": "min_length"}
"""The names of inputs in older releases."""
_SKIPPED = frozenset(
    {"model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "stop", "user"}
    | {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
"""Fields that are translated apart, and fields that do not change the answer."""
_NOT_TAKEN = {"text_input", "n", "beam_width"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_tokens": (0,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Values that change nothing, beside null and false."""


def triton_body(
    request: ParsedRequest, *, text: str, limit: int, inputs: frozenset[str] = ENSEMBLE
) -> dict[str, object]:
    """The body of `generate_stream` for a request with this prompt. Raises ApiError 400 naming the field."""
    native: dict[str, object] = {"text_input": text, "max_tokens": limit, "stream": True}
    asked = [name for name, value in request.fields.items() if name not in _SKIPPED and not _is_neutral(name, value)]
    for name in sorted(asked, key="ignore_eos".__eq__):
        # TensorRT-LLM never ends an answer before its least length; last, as it goes before `min_tokens`.
        own, value = ("min_tokens", limit) if name == "ignore_eos" else (name, request.fields[name])
        taker = next((each for each in (own, _OTHER_NAMES.get(own)) if each in inputs), None)
        if taker is None or name in _NOT_TAKEN:
            raise invalid(f"{name}: this engine (Triton) has no such input; leave the field out", name)
        if name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise invalid(f"{name} = {value!r}: must be a number", name)
        if name in _COUNTS and (type(value) is not int or value < 0):
            raise invalid(f"{name} = {value!r}: must be a whole number from 0 up", name)
        native[taker] = value
    # The answer is cut at a stop word in any case; a model that knows them ends by itself.
    if (stops := stop_texts(request)) and "stop_words" in inputs:
        native["stop_words"] = list(stops)
    return _greedy(native, inputs)


def _greedy(native: dict[str, object], inputs: frozenset[str]) -> dict[str, object]:
    """Temperature 0 becomes top_k 1, as TensorRT-LLM divides by the temperature. It is greedy also where neither top_k
    nor top_p is given, so that a temperature alone needs top_p 1.
    """
    if native.get("temperature") == 0:
        del native["temperature"]
        native["top_k"] = 1
    elif "temperature" in native and not native.keys() & {"top_k", "top_p"} and "top_p" in inputs:
        native["top_p"] = 1.0
    return native


def _is_neutral(name: str, value: object) -> bool:
    # 0 == False in Python, but `logprobs: 0` does change the answer.
    if value is None or value is False:
        return True
    return not isinstance(value, bool) and any(value == neutral for neutral in _NEUTRAL.get(name, ()))


def prompt_text(request: ParsedRequest) -> str:
    """The one text to be completed. Raises ApiError 400 for several prompts, and for token ids."""
    prompt, *others = request.prompts
    if others:
        raise invalid("prompt: this engine takes one text per request", "prompt")
    if not isinstance(prompt, str):
        raise invalid("prompt: this engine takes text, no token ids", "prompt")
    return prompt


def failure_text(body: bytes) -> str:
    """The message of an error that Triton answers with, be it JSON or an event of a stream."""
    try:
        found = from_json(body.removeprefix(b"data:").strip())
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("error"), str):
        return str(found["error"])
    return body[:500].decode(errors="replace") or "the engine gave no reason"


class StopWords:
    """Cuts a text off before the first stop word; holds back what could be the beginning of one."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words
        self._held = ""
        self.reached = False

    def feed(self, text: str) -> str:
        """The text to show now; nothing once a stop word is `reached`."""
        if not self._words:
            return text
        if self.reached:
            return ""
        text = self._held + text
        found = [at for word in self._words if (at := text.find(word)) >= 0]
        if found:
            self.reached, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, word) for word in self._words)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """The text that was held back, when the answer is over."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """Characters at the end of `text` that are the beginning of `word`."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)


class Generation:
    """One answer as Triton streams it: texts, count of tokens, why it ended, or the `failure` that Triton reports.

    Each event is a token. Empty events at the end only mark the end; empty events before a text are tokens: parts of a
    character that came whole with a later one.
    """

    def __init__(self, *, limit: int, stops: tuple[str, ...] = ()) -> None:
        self._limit = limit
        self._splitter = Splitter()
        self._stops = StopWords(stops)
        self._empty = 0
        self._reason: str | None = None
        self._ended = False
        self.begun = False
        self.tokens = 0
        self.failure: str | None = None

    def feed(self, chunk: bytes) -> list[bytes]:
        """The texts to show now, escaped for JSON; an empty chunk ends the stream.

        Raises ValueError for bytes that are no answer of Triton's.
        """
        texts = []
        self._ended = not chunk
        # The last event may lack its blank line.
        for data in map(data_of, self._splitter.feed(chunk or b"\n\n")):
            if self.cut:
                break
            if data is None:
                continue
            event = from_json(data)
            if not isinstance(event, dict):
                raise ValueError("an event is no JSON object")
            if "error" in event:
                self.failure = str(event["error"])
            elif shown := self._stops.feed(self._text(event)):
                texts.append(escaped(shown))
        if self._ended and not self.begun and self.failure is None:
            raise ValueError("it ended without an event")
        return texts

    def rest(self) -> bytes:
        """The text that was held back for a stop word, when the answer is over."""
        return escaped(self._stops.rest())

    @property
    def cut(self) -> bool:
        """Whether a stop word or a failure ended the answer: later events do not belong to it."""
        return self._stops.reached or self.failure is not None

    @property
    def over(self) -> bool:
        """Whether no more is to be read."""
        return self._ended or self.cut

    @property
    def full(self) -> bool:
        """Whether the answer is at its limit: no text follows."""
        return self.tokens >= self._limit

    @property
    def finish_reason(self) -> str:
        """The model's reason, else "length" for an answer at its limit."""
        if self._stops.reached:
            return "stop"
        return self._reason or ("length" if self.full else "stop")

    def _text(self, event: Mapping[str, object]) -> str:
        text = event.get("text_output")
        if not isinstance(text, str):
            raise ValueError("an event has no text_output")
        if event.get("finish_reason") in ("stop", "length"):
            self._reason = str(event["finish_reason"])
        self.begun = True
        if text:
            self.tokens = min(self.tokens + self._empty + 1, self._limit)
            self._empty = 0
        else:
            self._empty += 1
        return text
